#include "ort/node.h"

#include <atomic>
#include <memory>

namespace pard {
namespace {

std::optional<const Ort> table;
std::atomic<OrtStatus*> reserve{nullptr};

// Takes the message of a status, and releases it.
std::string message_of(OrtStatus* status) {
  const std::unique_ptr<OrtStatus, void (*)(OrtStatus*)> owner(status, ort().ReleaseStatus);
  return status ? ort().GetErrorMessage(status) : "";
}

const char* name_of_type(int type) { return type == ORT_FLOAT ? "float32" : type == ORT_UINT8 ? "uint8" : "int32"; }

}  // namespace

const Ort& ort() { return *table; }

bool set_ort(const void* const* entries) {
  if (!entries) return false;
  table.emplace(entries);
  if (!table->usable()) return false;
  reserve = table->CreateStatus(ORT_EP_FAIL, "pard_onnx: out of memory");
  return true;
}

void require(OrtStatus* status) {
  if (status) throw std::runtime_error(message_of(status));
}

OrtStatus* error_status(int code, const char* message) {
  OrtStatus* status = ort().CreateStatus(code, message);
  if (!status) status = reserve.exchange(nullptr);
  if (!status) std::terminate();  // no memory for one status, twice: a null status would pass off garbage as a result
  return status;
}

Tensor::Tensor(const OrtValue* value, const char* operator_name, const char* name, int expected) {
  demand(value != nullptr, operator_name, ": ", name, " is missing");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  require(ort().GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
      info, ort().ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  require(ort().GetDimensionsCount(info, &rank));
  shape.resize(rank);
  require(ort().GetDimensions(info, shape.data(), rank));
  require(ort().GetTensorElementType(info, &type));
  demand(type == expected, operator_name, ": ", name, " is not of ", name_of_type(expected));
  for (const int64_t dim : shape) demand(dim >= 0, operator_name, ": ", name, " has a dimension of ", dim);
  require(ort().GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // not written to where it is an input
}

size_t Tensor::count() const {
  size_t out = 1;
  for (const int64_t dim : shape) out *= static_cast<size_t>(dim);
  return out;
}

Node::Node(const OrtKernelInfo* info, const char* name) : info_(info), name_(name) {
  require(ort().KernelInfo_GetInputCount(info, &inputs_));
}

// ONNX Runtime has one error code for an attribute that is missing and for one of another type. Their messages differ,
// and what it says of a missing one is what it says of the name `ABSENT`.
bool Node::lacks(OrtStatus* status, OrtStatus* absent, const std::string& name) const {
  const std::unique_ptr<OrtStatus, void (*)(OrtStatus*)> owner(absent, ort().ReleaseStatus);
  const std::string message = message_of(status);
  std::string expected = absent ? ort().GetErrorMessage(absent) : "";
  const size_t at = expected.find(ABSENT);
  if (at != std::string::npos) expected.replace(at, std::string(ABSENT).size(), name);
  return message == expected;
}

std::invalid_argument Node::wrong_type(const std::string& name) const {
  return std::invalid_argument(name_ + ": the attribute " + name + " is of another type");
}

std::optional<int64_t> Node::integer(const std::string& name) const {
  return found(ort().KernelInfoGetAttribute_int64, name);
}

std::optional<float> Node::number(const std::string& name) const {
  return found(ort().KernelInfoGetAttribute_float, name);
}

std::optional<std::string> Node::text(const std::string& name) const {
  const auto get = ort().KernelInfoGetAttribute_string;
  size_t size = 0, ignored = 0;
  if (OrtStatus* status = get(info_, name.c_str(), nullptr, &size)) {  // asks for the size
    if (lacks(status, get(info_, ABSENT, nullptr, &ignored), name)) return std::nullopt;
    throw wrong_type(name);
  }
  std::string out(size, '\0');
  require(get(info_, name.c_str(), out.data(), &size));
  if (!out.empty()) out.pop_back();  // the size counts the zero at the end
  return out;
}

size_t Node::positive(const std::string& name) const {
  const std::optional<int64_t> value = integer(name);
  demand(value.has_value(), name_, ": no attribute ", name);
  demand(*value > 0, name_, ": ", name, " ", *value);
  return static_cast<size_t>(*value);
}

bool Node::flag(const std::string& name) const {
  const int64_t value = integer(name).value_or(0);
  demand(value == 0 || value == 1, name_, ": ", name, " ", value, ", not 0 or 1");
  return value == 1;
}

bool Node::has_input(size_t index) const {
  if (index >= inputs_) return false;
  size_t size = 0;
  require(ort().KernelInfo_GetInputName(info_, index, nullptr, &size));
  return size > 1;  // it counts the zero at the end
}

const OrtValue* Node::constant(size_t index, const char* input) const {
  if (!has_input(index)) return nullptr;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  require(ort().KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  demand(is_constant && value, name_, ": ", input, " is no constant of the graph");
  return value;
}

}  // namespace pard
