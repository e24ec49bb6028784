// One matrix, packed for the kernels.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "matmul/layout.h"

namespace pard {

// Large allocations, in huge pages where the system has them.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() const { return data_; }

 private:
  size_t alignment_;
  uint8_t* data_ = nullptr;
};

// The source of the standard tensors: copies `count` bytes at `offset` of one part to `target`.
// Called from several threads at once; throws if it fails. Scales are float32, or float16 beside minimums.
enum class Part { levels, scales, zero_points, minimums };
using Read = std::function<void(Part part, size_t offset, size_t count, void* target)>;

struct Weights {
  Layout layout;
  bool gated = false;  // panels alternate between a gate and an up matrix; the result is silu(gate) * up
  std::unique_ptr<Buffer> panels;
  std::vector<uint8_t> zeros;  // [panel][block][PANEL], or empty
  std::vector<float> bias;     // [panels * PANEL], or empty

  void set_bias(const float* values);  // [N]
  size_t outputs() const { return gated ? layout.outputs / 2 : layout.outputs; }  // of a row of results
  size_t bytes() const { return layout.bytes() + zeros.size() + bias.size() * sizeof(float); }
};

// Throws std::invalid_argument for a shape that the kernels do not support.
void check(const Layout& layout);

// Packs a standard MatMulNBits matrix: levels [N][blocks][block * bits / 8], scales [N][blocks], zero points [N][bytes],
// minimums [N][blocks]. The matrix is read and packed in parallel, a few rows at a time. Throws as `check` does, and what
// `read` throws.
Weights pack(const Layout& layout, const Read& read, size_t threads);

// Two matrices of one layout, whose N is a multiple of PANEL, as one of 2 N outputs.
Weights pack_gated(const Layout& layout, const Read& gate, const Read& up, size_t threads);

}  // namespace pard
