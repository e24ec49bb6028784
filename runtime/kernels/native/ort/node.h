// A node of the graph and its tensors, seen through ONNX Runtime's C API: calls that throw instead of returning.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort/ort_abi.h"
#include "matmul/weights.h"

namespace pard {

// The API's table; set once, by RegisterCustomOps.
const Ort& ort();
bool set_ort(const void* const* table);  // false if its start-up check fails

// Throws an exception if the call returned an error status.
void require(OrtStatus* status);

// Exceptions must not cross into ONNX Runtime, which another compiler may have built.
template <class F>
OrtStatus* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return ort().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return ort().CreateStatus(ORT_EP_FAIL, error.what());
  }
}

struct Tensor {
  std::vector<int64_t> shape;
  int type = 0;
  void* data = nullptr;

  explicit Tensor(const OrtValue* value);
  size_t count() const;
};

// A node's attributes and constant inputs, which can be read when its kernel is created.
class Node {
 public:
  Node(const OrtKernelInfo* info, const char* name);  // name: the operator's, for what goes wrong

  int64_t integer(const std::string& name) const;
  int64_t integer_or(const std::string& name, int64_t otherwise) const;
  float number_or(const std::string& name, float otherwise) const;
  size_t positive(const std::string& name) const;
  std::string text_or_empty(const char* name) const;

  size_t inputs() const { return inputs_; }

  // A constant input; null where there is none, or where the graph computes it.
  const OrtValue* constant(size_t index) const;

 private:
  template <class T>
  T found_or(T otherwise, OrtStatus* (*get)(const OrtKernelInfo*, const char*, T*), const std::string& name) const {
    T out{};
    OrtStatus* status = get(info_, name.c_str(), &out);
    if (!status) return out;
    ort().ReleaseStatus(status);
    return otherwise;
  }

  const OrtKernelInfo* info_;
  std::string name_;
  size_t inputs_ = 0;
};

// The tensors at `B_offset`, `scales_offset`, `zero_points_offset` and `minimums_offset` of a file, each name behind
// `prefix`. Scales are float32, or float16 if `scales_half` is 1; minimums are float16.
Read read_file(const Node& node, const Layout& layout, const std::string& path, const std::string& prefix);

}  // namespace pard
