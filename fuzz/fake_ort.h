// ONNX Runtime's C API as far as the operators use it, for nodes and tensors that no ONNX Runtime would let through.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort/ort_abi.h"

namespace pard {

struct OrtValue {
  int type = ORT_FLOAT;
  std::vector<int64_t> shape;
  std::shared_ptr<void> data;  // exactly as large as the shape says; null where it is empty
};

// An attribute of one of the types that operators ask for, or of another one.
struct Attribute {
  enum class Type { integer, number, text, other } type = Type::other;
  int64_t integer = 0;
  float number = 0;
  std::string text;
};

struct OrtKernelInfo {
  std::map<std::string, Attribute> attributes;
  std::vector<const OrtValue*> inputs;  // null: left out
  std::vector<bool> constants;          // by input
};

struct OrtKernelContext {
  std::vector<const OrtValue*> inputs;  // null: left out
  std::map<size_t, OrtValue> outputs;   // those that a call has asked for; one that is there before is the caller's
  size_t missing_output = SIZE_MAX;     // one that the node leaves out
  size_t threads = 1;
  uint8_t garbage = 0;                  // what new outputs are full of
};

}  // namespace pard

namespace fuzz {

constexpr size_t MOST_ELEMENTS = size_t{1} << 20;  // of a tensor

size_t element_bytes(int type);

// The number of elements; MOST_ELEMENTS + 1 if there are more.
size_t count_of(const std::vector<int64_t>& shape);

// A value of this shape with bytes of `garbage`.
pard::OrtValue new_value(int type, std::vector<int64_t> shape, uint8_t garbage);

// Registers the library's operators, at the first call, and returns them.
const std::vector<const pard::OrtCustomOp*>& operators();

// From now on the nth call of the API fails (0: none). was_failed: whether it has failed since.
void fail_call(size_t nth);
bool was_failed();

// Whether the status is an error, which is released.
bool is_error(pard::OrtStatus* status);

// Statuses and shapes that were not released yet.
long unreleased();

}  // namespace fuzz
