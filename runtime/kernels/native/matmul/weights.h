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

// Reads the standard tensors: copies `count` bytes at `offset` of one part to `target`; throws if it fails.
// Scales are float32, or float16 beside minimums.
enum class Part { levels, scales, zero_points, minimums };
using Read = std::function<void(Part part, size_t offset, size_t count, void* target)>;

// Makes a reader for one thread. Called from several threads at once; throws if it fails.
using Source = std::function<Read()>;

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

// Throws std::invalid_argument for a shape that the kernels do not support, or of which a size would not fit a size_t:
// that of the packed matrix, of the standard tensors, or of a call's scratch memory. Everything that is computed from
// a checked layout is exact.
void check(const Layout& layout);

// Packs a standard MatMulNBits matrix: levels [N][blocks][block * bits / 8], scales [N][blocks], zero points [N][bytes],
// minimums [N][blocks]. The matrix is read and packed in parallel, a few rows at a time. Throws as `check` does, what
// readers throw, std::bad_alloc, and std::invalid_argument for a scale or a minimum that is not finite.
Weights pack(const Layout& layout, const Source& source, size_t threads);

// Two matrices of one layout, whose N is a multiple of PANEL, as one of 2 N outputs.
Weights pack_gated(const Layout& layout, const Source& gate, const Source& up, size_t threads);

}  // namespace pard
