#include "ort/node.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>

#include "matmul/half.h"

namespace pard {
namespace {

std::unique_ptr<const Ort> table;

// Files that the calling thread reads from. Threads do not share a stream, as reading moves it.
class File {
 public:
  void read(const std::string& path, int64_t offset, size_t count, void* target) {
    if (path != path_) {
      stream_ = std::ifstream(std::filesystem::u8path(path), std::ios::binary);
      path_ = path;
    }
    stream_.clear();
    stream_.seekg(static_cast<std::streamoff>(offset));
    stream_.read(static_cast<char*>(target), static_cast<std::streamsize>(count));
    if (!stream_) {
      path_.clear();
      throw std::runtime_error(path + ": cannot be read at byte " + std::to_string(offset));
    }
  }

 private:
  std::string path_;
  std::ifstream stream_;
};

}  // namespace

const Ort& ort() { return *table; }

bool set_ort(const void* const* entries) {
  if (!entries) return false;
  table = std::make_unique<const Ort>(entries);
  return table->usable();
}

void require(OrtStatus* status) {
  if (!status) return;
  const std::string message = ort().GetErrorMessage(status);
  ort().ReleaseStatus(status);
  throw std::runtime_error(message);
}

Tensor::Tensor(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  require(ort().GetTensorTypeAndShape(value, &info));
  const auto release = [](OrtTensorTypeAndShapeInfo* i) { ort().ReleaseTensorTypeAndShapeInfo(i); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  size_t rank = 0;
  require(ort().GetDimensionsCount(info, &rank));
  shape.resize(rank);
  require(ort().GetDimensions(info, shape.data(), rank));
  require(ort().GetTensorElementType(info, &type));
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

int64_t Node::integer(const std::string& name) const {
  int64_t out = 0;
  require(ort().KernelInfoGetAttribute_int64(info_, name.c_str(), &out));
  return out;
}

int64_t Node::integer_or(const std::string& name, int64_t otherwise) const {
  return found_or(otherwise, ort().KernelInfoGetAttribute_int64, name);
}

float Node::number_or(const std::string& name, float otherwise) const {
  return found_or(otherwise, ort().KernelInfoGetAttribute_float, name);
}

size_t Node::positive(const std::string& name) const {
  const int64_t value = integer(name);
  if (value <= 0) throw std::invalid_argument(name_ + ": " + name + " " + std::to_string(value));
  return static_cast<size_t>(value);
}

std::string Node::text_or_empty(const char* name) const {
  size_t size = 0;
  OrtStatus* status = ort().KernelInfoGetAttribute_string(info_, name, nullptr, &size);  // asks for the size
  if (status) {
    ort().ReleaseStatus(status);
    return {};
  }
  std::string out(size, '\0');
  require(ort().KernelInfoGetAttribute_string(info_, name, &out[0], &size));
  return out.c_str();  // the size counts the zero at the end
}

const OrtValue* Node::constant(size_t index) const {
  if (index >= inputs_) return nullptr;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  OrtStatus* status = ort().KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value);
  if (status) {  // an optional input that the node leaves out
    ort().ReleaseStatus(status);
    return nullptr;
  }
  return is_constant ? value : nullptr;
}

Read read_file(const Node& node, const Layout& layout, const std::string& path, const std::string& prefix) {
  const int64_t levels = node.integer(prefix + "B_offset"), scales = node.integer(prefix + "scales_offset");
  const int64_t zeros = node.integer_or(prefix + "zero_points_offset", -1);
  const int64_t minimums = node.integer_or(prefix + "minimums_offset", -1);
  const bool half = node.integer_or(prefix + "scales_half", 0) != 0;
  if (layout.format.minimums && !half) throw std::invalid_argument("MatMulNBits: minimums beside scales in float32");
  const bool widened = half && !layout.format.minimums;
  const int64_t starts[] = {levels, scales, zeros, minimums};  // by Part
  return [=](Part part, size_t offset, size_t count, void* target) {
    static thread_local File file;
    if (part == Part::scales && widened) {
      static thread_local std::vector<uint16_t> stored;
      stored.resize(count / sizeof(float));
      file.read(path, scales + static_cast<int64_t>(offset / 2), count / 2, stored.data());
      std::transform(stored.begin(), stored.end(), static_cast<float*>(target), float_of_half);
      return;
    }
    file.read(path, starts[static_cast<size_t>(part)] + static_cast<int64_t>(offset), count, target);
  };
}

}  // namespace pard
