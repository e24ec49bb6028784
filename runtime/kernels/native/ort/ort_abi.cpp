#include "ort/ort_abi.h"

#include <cstring>

namespace pard {
namespace {

template <class F>
void set(F& function, const void* const* api, Entry entry) {
  function = reinterpret_cast<F>(const_cast<void*>(api[entry]));
}

}  // namespace

Ort::Ort(const void* const* api) {
  set(CreateStatus, api, CREATE_STATUS);
  set(GetErrorMessage, api, GET_ERROR_MESSAGE);
  set(CreateCustomOpDomain, api, CREATE_CUSTOM_OP_DOMAIN);
  set(CustomOpDomain_Add, api, CUSTOM_OP_DOMAIN_ADD);
  set(AddCustomOpDomain, api, ADD_CUSTOM_OP_DOMAIN);
  set(GetTensorMutableData, api, GET_TENSOR_MUTABLE_DATA);
  set(GetTensorElementType, api, GET_TENSOR_ELEMENT_TYPE);
  set(GetDimensionsCount, api, GET_DIMENSIONS_COUNT);
  set(GetDimensions, api, GET_DIMENSIONS);
  set(GetTensorTypeAndShape, api, GET_TENSOR_TYPE_AND_SHAPE);
  set(KernelInfoGetAttribute_float, api, KERNEL_INFO_GET_ATTRIBUTE_FLOAT);
  set(KernelInfoGetAttribute_int64, api, KERNEL_INFO_GET_ATTRIBUTE_INT64);
  set(KernelInfoGetAttribute_string, api, KERNEL_INFO_GET_ATTRIBUTE_STRING);
  set(KernelContext_GetInput, api, KERNEL_CONTEXT_GET_INPUT);
  set(KernelContext_GetOutput, api, KERNEL_CONTEXT_GET_OUTPUT);
  set(ReleaseStatus, api, RELEASE_STATUS);
  set(ReleaseTensorTypeAndShapeInfo, api, RELEASE_TENSOR_TYPE_AND_SHAPE_INFO);
  set(KernelInfo_GetInputCount, api, KERNEL_INFO_GET_INPUT_COUNT);
  set(KernelInfo_GetInputName, api, KERNEL_INFO_GET_INPUT_NAME);
  set(KernelInfoGetConstantInput_tensor, api, KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR);
  set(KernelContext_ParallelFor, api, KERNEL_CONTEXT_PARALLEL_FOR);
}

bool Ort::usable() const {
  const char* const text = "pard_onnx: start-up check";
  OrtStatus* status = CreateStatus(ORT_INVALID_ARGUMENT, text);
  if (!status) return false;
  const char* back = GetErrorMessage(status);
  const bool same = back && std::strcmp(back, text) == 0;
  ReleaseStatus(status);
  return same;
}

}  // namespace pard
