// A node of the graph and its tensors, seen through ONNX Runtime's C API: calls that throw instead of returning.
#pragma once

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "matmul/checked.h"
#include "ort/ort_abi.h"

namespace pard {

// The API's table; set once, by RegisterCustomOps.
const Ort& ort();
bool set_ort(const void* const* table);  // false if its start-up check fails

// Throws an exception if the call returned an error status.
void require(OrtStatus* status);

// An error status. Never null, which would mean success: where there is no memory for the message, a status that was
// made at start-up.
OrtStatus* error_status(int code, const char* message);

// Exceptions must not cross into ONNX Runtime, which another compiler may have built.
template <class F>
OrtStatus* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return error_status(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return error_status(ORT_EP_FAIL, "pard_onnx: out of memory");
  } catch (const std::exception& error) {
    return error_status(ORT_EP_FAIL, error.what());
  }
}

struct Tensor {
  std::vector<int64_t> shape;
  int type = 0;
  void* data = nullptr;

  // Throws std::invalid_argument where there is no value, or one of another element type than `expected`.
  Tensor(const OrtValue* value, const char* operator_name, const char* name, int expected);
  size_t size(size_t axis) const { return static_cast<size_t>(shape[axis]); }
  size_t count() const;
};

// A node's attributes and constant inputs, which can be read when its kernel is created. Throws std::invalid_argument
// for an attribute of another type than the one that is asked for.
class Node {
 public:
  Node(const OrtKernelInfo* info, const char* name);  // name: the operator's, for what goes wrong

  std::optional<int64_t> integer(const std::string& name) const;  // empty if the node does not have it
  std::optional<float> number(const std::string& name) const;
  std::optional<std::string> text(const std::string& name) const;
  size_t positive(const std::string& name) const;  // an integer that must be there, and above 0
  bool flag(const std::string& name) const;        // 0 or 1; false if the node does not have it

  const std::string& name() const { return name_; }
  size_t inputs() const { return inputs_; }

  // Whether the node is given the input: it may leave out optional ones.
  bool has_input(size_t index) const;

  // A constant input; null where it is left out. Throws std::invalid_argument if the graph computes it.
  const OrtValue* constant(size_t index, const char* input) const;

 private:
  bool lacks(OrtStatus* status, OrtStatus* absent, const std::string& name) const;

  template <class T>
  std::optional<T> found(OrtStatus* (*get)(const OrtKernelInfo*, const char*, T*), const std::string& name) const {
    T out{};
    OrtStatus* status = get(info_, name.c_str(), &out);
    if (!status) return out;
    T ignored{};
    return lacks(status, get(info_, ABSENT, &ignored), name) ? std::nullopt : throw wrong_type(name);
  }
  std::invalid_argument wrong_type(const std::string& name) const;

  static constexpr const char* ABSENT = "pard_onnx: no attribute";  // a name that no attribute has
  const OrtKernelInfo* info_;
  std::string name_;
  size_t inputs_ = 0;
};

}  // namespace pard
