#include "ort/ort_abi.h"

#include <cstring>

namespace pard {
namespace {

// Positions in OrtApi.
enum Entry : size_t {
  CREATE_STATUS = 0,
  GET_ERROR_MESSAGE = 2,
  CREATE_CUSTOM_OP_DOMAIN = 26,
  CUSTOM_OP_DOMAIN_ADD = 27,
  ADD_CUSTOM_OP_DOMAIN = 28,
  GET_TENSOR_MUTABLE_DATA = 51,
  GET_TENSOR_ELEMENT_TYPE = 60,
  GET_DIMENSIONS_COUNT = 61,
  GET_DIMENSIONS = 62,
  GET_TENSOR_TYPE_AND_SHAPE = 65,
  KERNEL_INFO_GET_ATTRIBUTE_FLOAT = 85,
  KERNEL_INFO_GET_ATTRIBUTE_INT64 = 86,
  KERNEL_INFO_GET_ATTRIBUTE_STRING = 87,
  KERNEL_CONTEXT_GET_INPUT = 90,
  KERNEL_CONTEXT_GET_OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99,
  KERNEL_INFO_GET_INPUT_COUNT = 230,
  KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR = 249,
  KERNEL_CONTEXT_PARALLEL_FOR = 274,
};

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
