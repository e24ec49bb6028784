// The operator pard_onnx::MatMulNBits: inputs and attributes of com.microsoft::MatMulNBits at accuracy level 4.
//
// A [.., K], B?, scales?, zero_points?, g_idx? (refused), bias? -> Y [.., N]
//
// B, scales and zero_points are constants of the graph, or lie in a file (attributes weights_file, B_offset,
// scales_offset, zero_points_offset). A file is read while packing and never kept, where ONNX Runtime would hold
// its constants beside the packed weights for as long as the session lives.
#include <algorithm>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "export.h"
#include "matmul.h"
#include "ort_abi.h"

namespace pard {
namespace {

enum Input : size_t { A, B, SCALES, ZERO_POINTS, G_IDX, BIAS, INPUTS };

std::unique_ptr<const Ort> ort;  // made once by RegisterCustomOps

struct Failure : std::runtime_error {
  using runtime_error::runtime_error;
};

// Throws what a call returned, if it did.
void require(OrtStatus* status) {
  if (!status) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw Failure(message);
}

// Exceptions must not cross into ONNX Runtime, which another compiler may have built.
template <class F>
OrtStatus* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return ort->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return ort->CreateStatus(ORT_EP_FAIL, error.what());
  }
}

struct Tensor {
  std::vector<int64_t> shape;
  int type = 0;
  void* data = nullptr;

  size_t count() const {
    size_t out = 1;
    for (const int64_t dim : shape) out *= static_cast<size_t>(dim);
    return out;
  }
};

Tensor tensor(const OrtValue* value) {
  Tensor out;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  require(ort->GetTensorTypeAndShape(value, &info));
  const auto release = [](OrtTensorTypeAndShapeInfo* i) { ort->ReleaseTensorTypeAndShapeInfo(i); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  size_t rank = 0;
  require(ort->GetDimensionsCount(info, &rank));
  out.shape.resize(rank);
  require(ort->GetDimensions(info, out.shape.data(), rank));
  require(ort->GetTensorElementType(info, &out.type));
  require(ort->GetTensorMutableData(const_cast<OrtValue*>(value), &out.data));  // not written to where it is an input
  return out;
}

// What a node says when its kernel is made.
class Node {
 public:
  explicit Node(const OrtKernelInfo* info) : info_(info) { require(ort->KernelInfo_GetInputCount(info, &inputs_)); }

  int64_t integer(const char* name) const {
    int64_t out = 0;
    require(ort->KernelInfoGetAttribute_int64(info_, name, &out));
    return out;
  }

  int64_t integer_or(const char* name, int64_t otherwise) const {
    int64_t out = 0;
    OrtStatus* status = ort->KernelInfoGetAttribute_int64(info_, name, &out);
    if (!status) return out;
    ort->ReleaseStatus(status);
    return otherwise;
  }

  std::string text_or_empty(const char* name) const {
    size_t size = 0;
    OrtStatus* status = ort->KernelInfoGetAttribute_string(info_, name, nullptr, &size);  // asks for the size
    if (status) {
      ort->ReleaseStatus(status);
      return {};
    }
    std::string out(size, '\0');
    require(ort->KernelInfoGetAttribute_string(info_, name, &out[0], &size));
    out.resize(out.find('\0') == std::string::npos ? out.size() : out.find('\0'));
    return out;
  }

  // A constant input, or null where there is none. Throws where it is computed by the graph.
  const OrtValue* constant(size_t index) const {
    if (index >= inputs_) return nullptr;
    int is_constant = 0;
    const OrtValue* value = nullptr;
    OrtStatus* status = ort->KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value);
    if (status) {  // an optional input that the node leaves out
      ort->ReleaseStatus(status);
      return nullptr;
    }
    return is_constant ? value : nullptr;
  }

 private:
  const OrtKernelInfo* info_;
  size_t inputs_ = 0;
};

size_t positive(const Node& node, const char* name) {
  const int64_t value = node.integer(name);
  if (value <= 0) throw std::invalid_argument(std::string("MatMulNBits: ") + name + " " + std::to_string(value));
  return static_cast<size_t>(value);
}

// Checks a constant's type and size; its data.
const void* expect(const OrtValue* value, const char* name, int type, size_t count) {
  const Tensor out = tensor(value);
  if (out.type != type || out.count() != count)
    throw std::invalid_argument(std::string("MatMulNBits: ") + name + " is of another type or size than K, N, bits and "
                                "block_size ask for");
  return out.data;
}

Read read_constants(const Node& node, const Layout& layout) {
  const OrtValue *levels = node.constant(B), *scales = node.constant(SCALES), *zeros = node.constant(ZERO_POINTS);
  if (!levels || !scales) throw std::invalid_argument("MatMulNBits: B and scales must be constants");
  const size_t n = layout.outputs;
  const void* const parts[] = {
      expect(levels, "B", ORT_UINT8, n * layout.row_bytes()), expect(scales, "scales", ORT_FLOAT, n * layout.blocks()),
      zeros ? expect(zeros, "zero_points", ORT_UINT8, n * layout.zero_row_bytes()) : nullptr};
  return [=](Part part, size_t offset, size_t count, void* target) {
    const auto* source = static_cast<const uint8_t*>(parts[static_cast<size_t>(part)]) + offset;
    std::copy(source, source + count, static_cast<uint8_t*>(target));
  };
}

// Each thread that packs opens the file for itself: streams are not shared.
Read read_file(const Node& node, const std::string& path) {
  const int64_t offsets[] = {node.integer("B_offset"), node.integer("scales_offset"),
                             node.integer_or("zero_points_offset", -1)};
  return [=](Part part, size_t offset, size_t count, void* target) {
    static thread_local std::string open;
    static thread_local std::ifstream stream;
    if (open != path) {
      stream = std::ifstream();
      stream.open(std::filesystem::u8path(path), std::ios::binary);
      open = path;
    }
    stream.clear();
    stream.seekg(static_cast<std::streamoff>(offsets[static_cast<size_t>(part)]) + static_cast<std::streamoff>(offset));
    stream.read(static_cast<char*>(target), static_cast<std::streamsize>(count));
    if (!stream) throw Failure(path + ": cannot be read at offset " + std::to_string(offsets[static_cast<size_t>(part)]));
  };
}

struct Kernel {
  Weights weights;
  const Isa& isa = selected_isa();

  explicit Kernel(const OrtKernelInfo* info) {
    const Node node(info);
    Layout layout;
    layout.format.bits = static_cast<int>(positive(node, "bits"));
    layout.format.block = positive(node, "block_size");
    layout.inputs = positive(node, "K");
    layout.outputs = positive(node, "N");
    check(layout);
    if (node.constant(G_IDX)) throw std::invalid_argument("MatMulNBits: g_idx is not supported");
    const std::string path = node.text_or_empty("weights_file");
    layout.format.zero_points = path.empty() ? node.constant(ZERO_POINTS) != nullptr
                                             : node.integer_or("zero_points_offset", -1) >= 0;
    weights = pack(layout, path.empty() ? read_constants(node, layout) : read_file(node, path),
                   std::thread::hardware_concurrency());
    if (const OrtValue* bias = node.constant(BIAS))
      weights.set_bias(static_cast<const float*>(expect(bias, "bias", ORT_FLOAT, layout.outputs)));
  }

  void compute(OrtKernelContext* context) const {
    const OrtValue* input = nullptr;
    require(ort->KernelContext_GetInput(context, A, &input));
    Tensor x = tensor(input);
    const Layout& layout = weights.layout;
    if (x.shape.empty() || static_cast<size_t>(x.shape.back()) != layout.inputs)
      throw std::invalid_argument("MatMulNBits: A's last dimension is not K " + std::to_string(layout.inputs));
    const size_t rows = x.count() / layout.inputs;
    x.shape.back() = static_cast<int64_t>(layout.outputs);
    OrtValue* output = nullptr;
    require(ort->KernelContext_GetOutput(context, 0, x.shape.data(), x.shape.size(), &output));
    void* out = nullptr;
    require(ort->GetTensorMutableData(output, &out));
    const Parallel threads{context, [](void* at, void (*task)(void*, size_t), size_t count, void* data) {
                             // 0 batches: as many as the pool has threads
                             require(ort->KernelContext_ParallelFor(static_cast<OrtKernelContext*>(at), task, count, 0, data));
                           }};
    matmul(isa, weights, static_cast<const float*>(x.data), rows, static_cast<float*>(out), threads);
  }
};

int input_type(const OrtCustomOp*, size_t index) { return index == B || index == ZERO_POINTS ? ORT_UINT8 : ORT_FLOAT; }

OrtStatus* create(const OrtCustomOp*, const void*, const OrtKernelInfo* info, void** kernel) {
  return guarded([&] { *kernel = new Kernel(info); });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
}

OrtCustomOp describe() {
  OrtCustomOp op{};
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp*) { return "MatMulNBits"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return INPUTS; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == A ? ORT_REQUIRED : ORT_OPTIONAL; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEMORY_DEFAULT; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1 << 30; };
  return op;
}

const OrtCustomOp OP = describe();

void add_domain(OrtSessionOptions* options) {
  static OrtCustomOpDomain* const domain = [] {  // lives as long as the process: sessions refer to it
    OrtCustomOpDomain* out = nullptr;
    require(ort->CreateCustomOpDomain("pard_onnx", &out));
    require(ort->CustomOpDomain_Add(out, &OP));
    return out;
  }();
  require(ort->AddCustomOpDomain(options, domain));
}

}  // namespace
}  // namespace pard

// ONNX Runtime's entry point: SessionOptions.register_custom_ops_library calls it.
PARD_EXPORT pard::OrtStatus* RegisterCustomOps(pard::OrtSessionOptions* options, const pard::OrtApiBase* base) {
  const void* const* table = base->GetApi(pard::ORT_API_VERSION);
  static const bool usable = [&] {
    if (table) pard::ort = std::make_unique<const pard::Ort>(table);
    return table && pard::ort->usable();
  }();
  // Without a table that can be trusted not even an error can be made. The caller's self-check fails: no such operator.
  if (!usable) return nullptr;
  return pard::guarded([&] { pard::add_domain(options); });
}
