// GroupQueryAttention: inputs and attributes of com.microsoft::GroupQueryAttention as pard-export writes it.
//   query [B, S, H * D] or packed qkv [B, S, (H + 2 KV) * D], key? and value? [B, S, KV * D],
//   past_key, past_value [B, KV, rows, D], seqlens_k int32 [B], total_sequence_length int32, cos_cache?, sin_cache?
//   [.., half] -> output [B, S, H * D], present_key, present_value: as the past, whose buffers they may be
//   Attributes num_heads, kv_num_heads, scale (1 / sqrt(D) where it is not given), do_rotary 1, or 0
//   without rotary tables, local_window_size (how many keys a row sees, its own included; all where it is not positive).
//
// Lengths and shapes are checked in every call; ONNX Runtime's operator reads and writes beyond its buffers instead.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "attention/attention.h"
#include "isa/dispatch.h"
#include "ort/op.h"

namespace pard {
namespace {

constexpr const char* NAME = "GroupQueryAttention";
enum Input : size_t { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS_K, TOTAL, COS, SIN, INPUTS };
enum Output : size_t { OUT, PRESENT_KEY, PRESENT_VALUE, OUTPUTS };

void demand(bool fits, const std::string& what) {
  if (!fits) throw std::invalid_argument(NAME + (": " + what));
}

// Where a sequence's new rows go: `past` rows are kept.
size_t past_of(int64_t last, int64_t total, size_t rows, size_t capacity) {
  const std::string lengths = "seqlens_k " + std::to_string(last) + ", total_sequence_length " + std::to_string(total);
  demand(last >= 0 && last < total, lengths);
  demand(static_cast<size_t>(total) <= capacity, lengths + ": the cache has " + std::to_string(capacity) + " rows");
  if (static_cast<size_t>(total) == rows) return 0;  // a first step, whose short sequences are padded behind
  demand(static_cast<size_t>(last) + 1 >= rows, lengths + ": fewer than the step's " + std::to_string(rows) + " rows");
  return static_cast<size_t>(last) + 1 - rows;
}

struct AttentionKernel {
  size_t heads, kv_heads;
  float scale;
  size_t window;
  bool turns;
  const Isa& isa = selected_isa();

  explicit AttentionKernel(const Node& node)
      : heads(node.positive("num_heads")), kv_heads(node.positive("kv_num_heads")), scale(node.number_or("scale", 0)),
        window(static_cast<size_t>(std::max<int64_t>(0, node.integer_or("local_window_size", -1)))),
        turns(node.integer_or("do_rotary", 0) == 1) {
    demand(heads % kv_heads == 0, "num_heads is no multiple of kv_num_heads");
    demand(turns || node.inputs() <= COS, "do_rotary is not 1, and there are rotary tables");
    demand(!turns || node.inputs() == INPUTS, "do_rotary is 1, and there are no rotary tables");
  }

  void compute(OrtKernelContext* context) const {
    const Call call{context};
    const Tensor query(call.input(QUERY)), past_key(call.input(PAST_KEY)), past_value(call.input(PAST_VALUE));
    demand(query.shape.size() == 3 && past_key.shape.size() == 4 && past_value.shape == past_key.shape &&
               past_key.shape[0] == query.shape[0] && past_key.shape[1] == static_cast<int64_t>(kv_heads),
           "query is not [batch, rows, ..] or the past not [batch, kv_num_heads, rows, head_dim]");
    const size_t batch = size(query, 0), capacity = size(past_key, 2);
    AttentionStep step{};
    step.heads = heads;
    step.kv_heads = kv_heads;
    step.dim = size(past_key, 3);
    step.rows = size(query, 1);
    step.capacity = capacity;
    step.scale = scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(step.dim));
    demand(step.dim % PANEL == 0, "head_dim " + std::to_string(step.dim) + " is no multiple of 16");
    step.window = window;
    const size_t positions = turns ? read_tables(call, step) : capacity;
    read_rows(call, query, step);

    const Tensor lasts(call.input(SEQLENS_K)), totals(call.input(TOTAL));
    demand(lasts.count() == batch && totals.count() == 1, "seqlens_k is not [batch] or total_sequence_length not one");
    const auto* last = static_cast<const int32_t*>(lasts.data);
    const int32_t total = *static_cast<const int32_t*>(totals.data);
    demand(batch == 1 || step.rows == 1 || step.rows == static_cast<size_t>(total),
           "several rows behind a past take a batch of 1");

    float* out = call.output(OUT, {query.shape[0], query.shape[1], static_cast<int64_t>(heads * step.dim)});
    float* keys = present(call, PRESENT_KEY, past_key);
    float* values = present(call, PRESENT_VALUE, past_value);
    for (size_t b = 0; b < batch && step.rows; ++b) {
      AttentionStep one = step;
      one.past = past_of(last[b], total, step.rows, capacity);
      demand(one.past + one.rows <= positions, "cos_cache has " + std::to_string(positions) + " rows for " +
                                                   std::to_string(one.past + one.rows) + " tokens");
      one.queries += b * step.rows * step.query_stride;
      one.keys += b * step.rows * step.kv_stride;
      one.values += b * step.rows * step.kv_stride;
      one.key_cache = keys + b * kv_heads * capacity * step.dim;
      one.value_cache = values + b * kv_heads * capacity * step.dim;
      one.out = out + b * step.rows * heads * step.dim;
      attention(isa, one, on_threads_of(context));
    }
  }

 private:
  static size_t size(const Tensor& tensor, size_t axis) { return static_cast<size_t>(tensor.shape[axis]); }

  // How many positions they have.
  static size_t read_tables(const Call& call, AttentionStep& step) {
    const Tensor cosines(call.input(COS)), sines(call.input(SIN));
    demand(cosines.shape.size() == 2 && sines.shape == cosines.shape && 2 * size(cosines, 1) <= step.dim,
           "cos_cache and sin_cache are not [rows, at most head_dim / 2]");
    step.cosines = static_cast<const float*>(cosines.data);
    step.sines = static_cast<const float*>(sines.data);
    step.half = size(cosines, 1);
    return size(cosines, 0);
  }

  // Three inputs, or one that holds them side by side.
  void read_rows(const Call& call, const Tensor& query, AttentionStep& step) const {
    const size_t width = heads * step.dim, kv_width = kv_heads * step.dim;
    const OrtValue *key = call.input(KEY), *value = call.input(VALUE);
    step.queries = static_cast<const float*>(query.data);
    if (!key && !value) {
      demand(size(query, 2) == width + 2 * kv_width, "query is not (num_heads + 2 * kv_num_heads) * head_dim wide");
      step.query_stride = step.kv_stride = size(query, 2);
      step.keys = step.queries + width;
      step.values = step.keys + kv_width;
      return;
    }
    demand(key && value, "key without value");
    const Tensor keys(key), values(value);
    const std::vector<int64_t> wanted{query.shape[0], query.shape[1], static_cast<int64_t>(kv_width)};
    demand(size(query, 2) == width && keys.shape == wanted && values.shape == wanted,
           "query is not num_heads * head_dim wide, or key or value not kv_num_heads * head_dim");
    step.query_stride = width;
    step.kv_stride = kv_width;
    step.keys = static_cast<const float*>(keys.data);
    step.values = static_cast<const float*>(values.data);
  }

  // The buffer to write to: the past's own, or a copy of it.
  static float* present(const Call& call, Output index, const Tensor& past) {
    float* out = call.output(index, past.shape);
    if (out != past.data) std::memcpy(out, past.data, past.count() * sizeof(float));
    return out;
  }
};

}  // namespace

OrtCustomOp attention_op() {
  OrtCustomOp op = described<AttentionKernel>();
  op.GetName = [](const OrtCustomOp*) { return NAME; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return INPUTS; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == SEQLENS_K || i == TOTAL ? ORT_INT32 : ORT_FLOAT; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == KEY || i == VALUE || i >= COS ? ORT_OPTIONAL : ORT_REQUIRED; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return OUTPUTS; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const void*, const OrtKernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new AttentionKernel(Node(info, NAME)); });
  };
  return op;
}

}  // namespace pard
