// What the operators of the domain pard_onnx share.
#pragma once

#include <cstdint>
#include <vector>

#include "ort/node.h"
#include "ort/parallel.h"

namespace pard {

// Pieces of work on the session's own threads.
inline Parallel on_threads_of(OrtKernelContext* context) {
  return {context, [](void* from, void (*task)(void*, size_t), size_t count, void* data) {
            // 0 batches: each task is offered to a thread
            require(ort().KernelContext_ParallelFor(static_cast<OrtKernelContext*>(from), task, count, 0, data));
          }};
}

// The inputs and outputs of one call.
struct Call {
  OrtKernelContext* context;
  const char* operator_name;

  // Null where the node leaves it out.
  const OrtValue* input(size_t index) const {
    const OrtValue* out = nullptr;
    require(ort().KernelContext_GetInput(context, index, &out));
    return out;
  }

  Tensor tensor(size_t index, const char* name, int type = ORT_FLOAT) const {
    return {input(index), operator_name, name, type};
  }

  float* output(size_t index, const std::vector<int64_t>& shape) const {
    OrtValue* value = nullptr;
    require(ort().KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    demand(value != nullptr, operator_name, ": output ", index, " is missing");
    void* out = nullptr;
    require(ort().GetTensorMutableData(value, &out));
    return static_cast<float*>(out);
  }
};

// The properties of an operator that ONNX Runtime asks for. KERNEL has a `compute(OrtKernelContext*)`.
template <class KERNEL>
OrtCustomOp described() {
  OrtCustomOp op{};
  op.version = ORT_API_VERSION;
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEMORY_DEFAULT; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1 << 30; };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const KERNEL*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<KERNEL*>(kernel); };
  return op;
}

OrtCustomOp attention_op();

}  // namespace pard
