#include "fake_ort.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "allocations.h"

namespace pard {

struct OrtStatus {
  std::string message;
};
struct OrtTensorTypeAndShapeInfo {
  const OrtValue* value;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> operators;
};
struct OrtSessionOptions {
  const OrtCustomOpDomain* domain = nullptr;
};

}  // namespace pard

extern "C" pard::OrtStatus* RegisterCustomOps(pard::OrtSessionOptions* options, const pard::OrtApiBase* base);

namespace fuzz {
namespace {

using namespace pard;

std::atomic<size_t> calls_left{0};
std::atomic<bool> failed{false};
std::atomic<long> alive{0};

OrtStatus* error(std::string message) {
  ++alive;
  return new OrtStatus{std::move(message)};
}

// A call of the API: fails if it is the one that shall. What is allocated in it is ONNX Runtime's.
template <class F>
OrtStatus* called(F&& body) {
  const Uncounted uncounted;
  size_t now = calls_left;
  while (now > 0 && !calls_left.compare_exchange_weak(now, now - 1)) {
  }
  if (now == 1) failed = true;
  return now == 1 ? error("a call that fails") : body();
}

OrtStatus* create_status(int, const char* message) {
  const Uncounted uncounted;
  return error(message);
}

void release_status(OrtStatus* status) {
  --alive;
  delete status;
}

OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) {
  return called([&]() -> OrtStatus* {
    ++alive;
    *out = new OrtTensorTypeAndShapeInfo{value};
    return nullptr;
  });
}

void release_info(OrtTensorTypeAndShapeInfo* info) {
  --alive;
  delete info;
}

OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) {
  return called([&]() -> OrtStatus* {
    std::copy_n(info->value->shape.begin(), std::min(count, info->value->shape.size()), out);
    return nullptr;
  });
}

// ONNX Runtime's words: the messages of a missing attribute and of one of another type differ.
template <class F>
OrtStatus* attribute(const OrtKernelInfo* info, const char* name, Attribute::Type type, F&& take) {
  return called([&]() -> OrtStatus* {
    const auto found = info->attributes.find(name);
    if (found == info->attributes.end()) return error("No attribute with name:'" + std::string(name) + "'is defined.");
    if (found->second.type != type) return error("Attribute name and type don't match");
    take(found->second);
    return nullptr;
  });
}

// A text with its zero, or only its size where there is no room for it.
OrtStatus* give_text(const std::string& text, char* out, size_t* size) {
  const size_t wanted = text.size() + 1;
  if (out && *size < wanted) return error("too small");
  if (out) std::memcpy(out, text.c_str(), wanted);
  *size = wanted;
  return nullptr;
}

OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out) {
  return called([&]() -> OrtStatus* {
    *is_constant = index < info->inputs.size() && info->inputs[index] && info->constants[index];
    *out = *is_constant ? info->inputs[index] : nullptr;
    return nullptr;
  });
}

OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** out) {
  return called([&]() -> OrtStatus* {
    const std::vector<int64_t> shape(dims, dims + rank);
    *out = nullptr;
    if (index == context->missing_output) return nullptr;
    if (count_of(shape) > MOST_ELEMENTS) return error("no memory for an output");
    const auto bound = context->outputs.find(index);
    if (bound != context->outputs.end() && bound->second.shape != shape) return error("an output of another shape");
    if (bound == context->outputs.end()) context->outputs[index] = new_value(ORT_FLOAT, shape, context->garbage);
    *out = &context->outputs[index];
    return nullptr;
  });
}

OrtStatus* parallel(const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, size_t, void* data) {
  if (OrtStatus* status = called([]() -> OrtStatus* { return nullptr; })) return status;
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t i; (i = next++) < count;) task(data, i);
  };
  std::vector<std::thread> helpers;
  {
    const Uncounted uncounted;
    for (size_t i = 1; i < std::min(context->threads, count); ++i) helpers.emplace_back(run);
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  return nullptr;
}

template <class F>
void* entry(F function) {
  return reinterpret_cast<void*>(function);
}

const void* const* api(uint32_t) {
  static const void* table[ENTRIES] = {};
  table[CREATE_STATUS] = entry(create_status);
  table[GET_ERROR_MESSAGE] = entry(+[](const OrtStatus* status) { return status->message.c_str(); });
  table[RELEASE_STATUS] = entry(release_status);
  table[CREATE_CUSTOM_OP_DOMAIN] = entry(+[](const char*, OrtCustomOpDomain** out) -> OrtStatus* {
    static OrtCustomOpDomain domain;
    *out = &domain;
    return nullptr;
  });
  table[CUSTOM_OP_DOMAIN_ADD] = entry(+[](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
    domain->operators.push_back(op);
    return nullptr;
  });
  table[ADD_CUSTOM_OP_DOMAIN] = entry(+[](OrtSessionOptions* options, OrtCustomOpDomain* domain) -> OrtStatus* {
    options->domain = domain;
    return nullptr;
  });
  table[GET_TENSOR_MUTABLE_DATA] = entry(+[](OrtValue* value, void** out) {
    return called([&]() -> OrtStatus* { return *out = value->data.get(), nullptr; });
  });
  table[GET_TENSOR_ELEMENT_TYPE] = entry(+[](const OrtTensorTypeAndShapeInfo* info, int* out) {
    return called([&]() -> OrtStatus* { return *out = info->value->type, nullptr; });
  });
  table[GET_DIMENSIONS_COUNT] = entry(+[](const OrtTensorTypeAndShapeInfo* info, size_t* out) {
    return called([&]() -> OrtStatus* { return *out = info->value->shape.size(), nullptr; });
  });
  table[GET_DIMENSIONS] = entry(dimensions);
  table[GET_TENSOR_TYPE_AND_SHAPE] = entry(type_and_shape);
  table[RELEASE_TENSOR_TYPE_AND_SHAPE_INFO] = entry(release_info);
  table[KERNEL_INFO_GET_ATTRIBUTE_FLOAT] = entry(+[](const OrtKernelInfo* info, const char* name, float* out) {
    return attribute(info, name, Attribute::Type::number, [&](const Attribute& found) { *out = found.number; });
  });
  table[KERNEL_INFO_GET_ATTRIBUTE_INT64] = entry(+[](const OrtKernelInfo* info, const char* name, int64_t* out) {
    return attribute(info, name, Attribute::Type::integer, [&](const Attribute& found) { *out = found.integer; });
  });
  table[KERNEL_INFO_GET_ATTRIBUTE_STRING] =
      entry(+[](const OrtKernelInfo* info, const char* name, char* out, size_t* size) {
        OrtStatus* status = nullptr;
        const auto give = [&](const Attribute& found) { status = give_text(found.text, out, size); };
        OrtStatus* const other = attribute(info, name, Attribute::Type::text, give);
        return other ? other : status;
      });
  table[KERNEL_INFO_GET_INPUT_COUNT] = entry(+[](const OrtKernelInfo* info, size_t* out) {
    return called([&]() -> OrtStatus* { return *out = info->inputs.size(), nullptr; });
  });
  table[KERNEL_INFO_GET_INPUT_NAME] = entry(+[](const OrtKernelInfo* info, size_t index, char* out, size_t* size) {
    return called([&] { return give_text(info->inputs[index] ? "x" : "", out, size); });
  });
  table[KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR] = entry(constant_input);
  table[KERNEL_CONTEXT_GET_INPUT] = entry(+[](const OrtKernelContext* context, size_t index, const OrtValue** out) {
    return called([&]() -> OrtStatus* {
      *out = index < context->inputs.size() ? context->inputs[index] : nullptr;
      return nullptr;
    });
  });
  table[KERNEL_CONTEXT_GET_OUTPUT] = entry(output);
  table[KERNEL_CONTEXT_PARALLEL_FOR] = entry(parallel);
  return table;
}

}  // namespace

size_t element_bytes(int type) { return type == ORT_UINT8 ? 1 : 4; }

size_t count_of(const std::vector<int64_t>& shape) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  size_t out = 1;
  for (const int64_t dim : shape) {
    if (dim < 0 || static_cast<size_t>(dim) > MOST_ELEMENTS / out) return MOST_ELEMENTS + 1;
    out *= static_cast<size_t>(dim);
  }
  return out;
}

pard::OrtValue new_value(int type, std::vector<int64_t> shape, uint8_t garbage) {
  const size_t bytes = count_of(shape) * element_bytes(type);
  OrtValue out{type, std::move(shape), {}};
  if (bytes) out.data = std::shared_ptr<void>(std::malloc(bytes), std::free);
  if (bytes) std::memset(out.data.get(), garbage, bytes);
  return out;
}

const std::vector<const pard::OrtCustomOp*>& operators() {
  static const OrtCustomOpDomain* const domain = [] {
    OrtSessionOptions options;
    const OrtApiBase base{api, nullptr};
    if (RegisterCustomOps(&options, &base) || !options.domain) std::abort();
    alive = 0;  // but for what the library keeps
    return options.domain;
  }();
  return domain->operators;
}

void fail_call(size_t nth) {
  failed = false;
  calls_left = nth;
}

bool was_failed() { return failed; }

bool is_error(pard::OrtStatus* status) {
  if (!status) return false;
  if (status->message.empty()) std::abort();  // an error without a word
  release_status(status);
  return true;
}

long unreleased() { return alive; }

}  // namespace fuzz
