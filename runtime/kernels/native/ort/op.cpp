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
#include "ort/weights_file.h"

namespace pard {
namespace {

constexpr const char *DOMAIN_NAME = "pard_onnx", *PLAIN = "MatMulNBits", *GATED = "GatedMatMulNBits";
enum Input : size_t { A, B, SCALES, ZERO_POINTS, G_IDX, BIAS, INPUTS };

Layout layout_of(const Node& node, bool zero_points, bool minimums) {
  const size_t bits = node.positive("bits");
  demand(bits <= 8, node.name(), ": bits ", bits, ", not 4 or 8");
  Layout out;
  out.format.bits = static_cast<int>(bits);
  out.format.block = node.positive("block_size");
  out.format.zero_points = zero_points;
  out.format.minimums = minimums;
  out.inputs = node.positive("K");
  out.outputs = node.positive("N");
  check(out);
  return out;
}

// A constant's data, if its type and size are right.
const void* expect(const Node& node, const OrtValue* value, const char* name, int type, size_t count) {
  const Tensor out(value, node.name().c_str(), name, type);
  demand(out.count() == count, node.name(), ": ", name, " is of another size than K, N, bits and block_size ask for: ",
         out.count(), " instead of ", count);
  return out.data;
}

Source constants_source(const Node& node, const Layout& layout) {
  const OrtValue *levels = node.constant(B, "B"), *scales = node.constant(SCALES, "scales");
  const OrtValue* zeros = node.constant(ZERO_POINTS, "zero_points");
  const size_t n = layout.outputs;
  const void* const parts[] = {
      expect(node, levels, "B", ORT_UINT8, n * layout.row_bytes()),
      expect(node, scales, "scales", ORT_FLOAT, n * layout.blocks()),
      zeros ? expect(node, zeros, "zero_points", ORT_UINT8, n * layout.zero_row_bytes()) : nullptr};
  const Read read = [=](Part part, size_t offset, size_t count, void* target) {
    const auto* source = static_cast<const uint8_t*>(parts[static_cast<size_t>(part)]) + offset;
    std::copy(source, source + count, static_cast<uint8_t*>(target));
  };
  return [=] { return read; };
}

Weights plain_weights(const Node& node) {
  const std::optional<std::string> path = node.text("weights_file");
  const bool in_file = path.has_value();
  for (const char* name : {"B_offset", "scales_offset", "zero_points_offset", "minimums_offset", "scales_half"})
    demand(in_file || !node.integer(name), node.name(), ": the attribute ", name, " without weights_file");
  for (size_t i = B; i <= ZERO_POINTS; ++i)
    demand(!in_file || !node.has_input(i), node.name(), ": weights_file beside weights among the inputs");
  demand(!node.has_input(G_IDX), node.name(), ": g_idx is not supported");
  const bool zero_points = in_file ? node.integer("zero_points_offset").has_value() : node.has_input(ZERO_POINTS);
  const Layout layout = layout_of(node, zero_points, node.integer("minimums_offset").has_value());
  const OrtValue* bias = node.constant(BIAS, "bias");
  const void* sums = bias ? expect(node, bias, "bias", ORT_FLOAT, layout.outputs) : nullptr;
  Weights out = pack(layout, in_file ? file_source(node, layout, *path, "") : constants_source(node, layout),
                     std::thread::hardware_concurrency());
  if (sums) out.set_bias(static_cast<const float*>(sums));
  return out;
}

Weights gated_weights(const Node& node) {
  const std::string path = node.text("weights_file").value_or("");
  const Layout layout = layout_of(node, node.integer("gate_zero_points_offset").has_value(),
                                  node.integer("gate_minimums_offset").has_value());
  return pack_gated(layout, file_source(node, layout, path, "gate_"), file_source(node, layout, path, "up_"),
                    std::thread::hardware_concurrency());
}

struct Kernel {
  const char* name;
  Weights weights;
  const Isa& isa = selected_isa();

  void compute(OrtKernelContext* context) const {
    const Call call{context, name};
    const Tensor x = call.tensor(A, "A");
    const size_t inputs = weights.layout.inputs;
    demand(!x.shape.empty() && x.size(x.shape.size() - 1) == inputs, name, ": A's last dimension is not K ", inputs);
    std::vector<int64_t> shape = x.shape;
    shape.back() = static_cast<int64_t>(weights.outputs());
    matmul(isa, weights, static_cast<const float*>(x.data), x.count() / inputs, call.output(0, shape),
           on_threads_of(context));
  }
};

template <Weights (*MAKE)(const Node&), const char* const& NAME>
OrtStatus* create(const OrtCustomOp*, const void*, const OrtKernelInfo* info, void** kernel) {
  return guarded([&] { *kernel = new Kernel{NAME, MAKE(Node(info, NAME))}; });
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
  op.GetName = [](const OrtCustomOp*) { return PLAIN; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return INPUTS; };
  op.CreateKernelV2 = create<plain_weights, PLAIN>;
  return op;
}

OrtCustomOp gated() {
  OrtCustomOp op = matmul_op();
  op.GetName = [](const OrtCustomOp*) { return GATED; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.CreateKernelV2 = create<gated_weights, GATED>;
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
