// The matmuls of the domain pard_onnx, and the domain.
//
// MatMulNBits: inputs and attributes of com.microsoft::MatMulNBits at accuracy level 4.
//   A [.., K], B?, scales?, zero_points?, g_idx? (refused), bias? -> Y [.., N]
//   B, scales and zero_points are constants of the graph, or lie in a file: attributes weights_file, B_offset,
//   scales_offset, zero_points_offset, and scales_half for scales in float16. minimums_offset: of a minimum beside each
//   scale, in float16; weights are then scale * level + minimum. A file is read while packing and never kept, where
//   ONNX Runtime would hold its constants beside the packed weights for as long as the session lives.
//
// GatedMatMulNBits: silu(A x gate) * (A x up), each a matrix [N, K] of one format in the file: offsets as above, with
//   the prefixes gate_ and up_.
//   A [.., K] -> Y [.., N]
#include <algorithm>
#include <string>
#include <thread>

#include "isa/dispatch.h"
#include "ort/export.h"
#include "matmul/matmul.h"
#include "ort/op.h"

namespace pard {
namespace {

constexpr const char* DOMAIN_NAME = "pard_onnx";
enum Input : size_t { A, B, SCALES, ZERO_POINTS, G_IDX, BIAS, INPUTS };

Layout layout_of(const Node& node, bool zero_points, bool minimums) {
  Layout out;
  out.format.bits = static_cast<int>(node.positive("bits"));
  out.format.block = node.positive("block_size");
  out.format.zero_points = zero_points;
  out.format.minimums = minimums;
  out.inputs = node.positive("K");
  out.outputs = node.positive("N");
  check(out);
  return out;
}

// A constant's data, if its type and size are right.
const void* expect(const OrtValue* value, const char* name, int type, size_t count) {
  const Tensor out(value);
  if (out.type != type || out.count() != count)
    throw std::invalid_argument(std::string("MatMulNBits: ") + name +
                                " is of another type or size than K, N, bits and block_size ask for");
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

Weights plain_weights(const Node& node) {
  const std::string path = node.text_or_empty("weights_file");
  const bool zero_points =
      path.empty() ? node.constant(ZERO_POINTS) != nullptr : node.integer_or("zero_points_offset", -1) >= 0;
  const Layout layout = layout_of(node, zero_points, !path.empty() && node.integer_or("minimums_offset", -1) >= 0);
  if (node.constant(G_IDX)) throw std::invalid_argument("MatMulNBits: g_idx is not supported");
  const Read read = path.empty() ? read_constants(node, layout) : read_file(node, layout, path, "");
  Weights out = pack(layout, read, std::thread::hardware_concurrency());
  if (const OrtValue* bias = node.constant(BIAS))
    out.set_bias(static_cast<const float*>(expect(bias, "bias", ORT_FLOAT, layout.outputs)));
  return out;
}

Weights gated_weights(const Node& node) {
  const std::string path = node.text_or_empty("weights_file");
  const Layout layout = layout_of(node, node.integer_or("gate_zero_points_offset", -1) >= 0,
                                  node.integer_or("gate_minimums_offset", -1) >= 0);
  return pack_gated(layout, read_file(node, layout, path, "gate_"), read_file(node, layout, path, "up_"),
                    std::thread::hardware_concurrency());
}

struct Kernel {
  Weights weights;
  const Isa& isa = selected_isa();

  void compute(OrtKernelContext* context) const {
    const Call call{context};
    const Tensor x(call.input(A));
    const size_t inputs = weights.layout.inputs;
    if (x.shape.empty() || static_cast<size_t>(x.shape.back()) != inputs)
      throw std::invalid_argument("MatMulNBits: A's last dimension is not K " + std::to_string(inputs));
    std::vector<int64_t> shape = x.shape;
    shape.back() = static_cast<int64_t>(weights.outputs());
    matmul(isa, weights, static_cast<const float*>(x.data), x.count() / inputs, call.output(0, shape),
           on_threads_of(context));
  }
};

template <Weights (*MAKE)(const Node&)>
OrtStatus* create(const OrtCustomOp*, const void*, const OrtKernelInfo* info, void** kernel) {
  return guarded([&] { *kernel = new Kernel{MAKE(Node(info, "MatMulNBits"))}; });
}

int input_type(const OrtCustomOp*, size_t index) { return index == B || index == ZERO_POINTS ? ORT_UINT8 : ORT_FLOAT; }

// The properties of both matmuls that ONNX Runtime asks for.
OrtCustomOp matmul_op() {
  OrtCustomOp op = described<Kernel>();
  op.GetInputType = input_type;
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == A ? ORT_REQUIRED : ORT_OPTIONAL; };
  return op;
}

OrtCustomOp plain() {
  OrtCustomOp op = matmul_op();
  op.GetName = [](const OrtCustomOp*) { return "MatMulNBits"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return INPUTS; };
  op.CreateKernelV2 = create<plain_weights>;
  return op;
}

OrtCustomOp gated() {
  OrtCustomOp op = matmul_op();
  op.GetName = [](const OrtCustomOp*) { return "GatedMatMulNBits"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.CreateKernelV2 = create<gated_weights>;
  return op;
}

const OrtCustomOp OPERATORS[] = {plain(), gated(), attention_op()};

void add_domain(OrtSessionOptions* options) {
  static OrtCustomOpDomain* const domain = [] {  // lives as long as the process: sessions refer to it
    OrtCustomOpDomain* out = nullptr;
    require(ort().CreateCustomOpDomain(DOMAIN_NAME, &out));
    for (const OrtCustomOp& op : OPERATORS) require(ort().CustomOpDomain_Add(out, &op));
    return out;
  }();
  require(ort().AddCustomOpDomain(options, domain));
}

}  // namespace
}  // namespace pard

// ONNX Runtime's entry point: SessionOptions.register_custom_ops_library calls it.
PARD_EXPORT pard::OrtStatus* RegisterCustomOps(pard::OrtSessionOptions* options, const pard::OrtApiBase* base) {
  // Without a valid table not even an error can be created. The session then reports that the operator is unknown.
  static const bool usable = pard::set_ort(base->GetApi(pard::ORT_API_VERSION));
  return usable ? pard::guarded([&] { pard::add_domain(options); }) : nullptr;
}
