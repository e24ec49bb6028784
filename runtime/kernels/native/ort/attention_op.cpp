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
#include <optional>

#include "attention/attention.h"
#include "isa/dispatch.h"
#include "ort/op.h"

namespace pard {
namespace {

constexpr const char* NAME = "GroupQueryAttention";
enum Input : size_t { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS_K, TOTAL, COS, SIN, INPUTS };
enum Output : size_t { OUT, PRESENT_KEY, PRESENT_VALUE, OUTPUTS };

// As pard::demand, with the operator's name.
template <class... Parts>
void demand(bool fits, const Parts&... message) {
  pard::demand(fits, NAME, ": ", message...);
}

// Where a sequence's new rows go: `past` rows are kept.
size_t past_of(int64_t last, int64_t total, size_t rows, size_t capacity) {
  const char* const behind = ", total_sequence_length ";
  demand(last >= 0 && last < total, "seqlens_k ", last, behind, total);
  const auto end = static_cast<size_t>(total), count = static_cast<size_t>(last) + 1;
  demand(end <= capacity, "seqlens_k ", last, behind, total, ": the cache has ", capacity, " rows");
  if (end == rows) return 0;  // a first step, whose short sequences are padded behind
  demand(count >= rows, "seqlens_k ", last, behind, total, ": fewer than the step's ", rows, " rows");
  return count - rows;
}

struct AttentionKernel {
  size_t heads, kv_heads;
  float scale;  // 0: the default
  size_t window;
  bool turns;
  const Isa& isa = selected_isa();

  explicit AttentionKernel(const Node& node)
      : heads(node.positive("num_heads")), kv_heads(node.positive("kv_num_heads")),
        scale(node.number("scale").value_or(0)),
        window(static_cast<size_t>(std::max<int64_t>(0, node.integer("local_window_size").value_or(-1)))),
        turns(node.flag("do_rotary")) {
    demand(heads % kv_heads == 0, "num_heads is no multiple of kv_num_heads");
    demand(std::isfinite(scale), "scale is not finite");
    const bool cosines = node.has_input(COS), sines = node.has_input(SIN);
    demand(turns || (!cosines && !sines), "do_rotary is not 1, and there are rotary tables");
    demand(!turns || (cosines && sines), "do_rotary is 1, and there are no rotary tables");
  }

  void compute(OrtKernelContext* context) const {
    const Call call{context, NAME};
    const Tensor query = call.tensor(QUERY, "query"), past_key = call.tensor(PAST_KEY, "past_key"),
                 past_value = call.tensor(PAST_VALUE, "past_value");
    demand(query.shape.size() == 3 && past_key.shape.size() == 4 && past_value.shape == past_key.shape &&
               past_key.shape[0] == query.shape[0] && past_key.size(1) == kv_heads,
           "query is not [batch, rows, ..] or the past not [batch, kv_num_heads, rows, head_dim]");
    const size_t batch = query.size(0), capacity = past_key.size(2);
    AttentionStep step{};
    step.heads = heads;
    step.kv_heads = kv_heads;
    step.dim = past_key.size(3);
    step.rows = query.size(1);
    step.capacity = capacity;
    step.scale = scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(step.dim));
    demand(step.dim > 0 && step.dim % PANEL == 0, "head_dim ", step.dim, " is no multiple of 16");
    step.window = window;
    const size_t positions = turns ? read_tables(call, step) : capacity;
    const size_t width = read_rows(call, query, step);

    const Tensor lasts = call.tensor(SEQLENS_K, "seqlens_k", ORT_INT32),
                 totals = call.tensor(TOTAL, "total_sequence_length", ORT_INT32);
    demand(lasts.count() == batch && totals.count() == 1, "seqlens_k is not [batch] or total_sequence_length not one");
    const auto* last = static_cast<const int32_t*>(lasts.data);
    const int32_t total = *static_cast<const int32_t*>(totals.data);
    demand(batch == 1 || step.rows == 1 || step.rows == static_cast<size_t>(total),
           "several rows behind a past take a batch of 1");

    float* out = call.output(OUT, {query.shape[0], query.shape[1], static_cast<int64_t>(width)});
    float* keys = present(call, PRESENT_KEY, past_key);
    float* values = present(call, PRESENT_VALUE, past_value);
    for (size_t b = 0; b < batch && step.rows; ++b) {
      AttentionStep one = step;
      one.past = past_of(last[b], total, step.rows, capacity);
      const size_t end = one.past + one.rows;
      demand(end <= positions, "cos_cache has ", positions, " rows for ", end, " tokens");
      one.queries += b * step.rows * step.query_stride;
      one.keys += b * step.rows * step.kv_stride;
      one.values += b * step.rows * step.kv_stride;
      one.key_cache = keys + b * kv_heads * capacity * step.dim;
      one.value_cache = values + b * kv_heads * capacity * step.dim;
      one.out = out + b * step.rows * width;
      attention(isa, one, on_threads_of(context));
    }
  }

 private:
  // How many positions they have.
  static size_t read_tables(const Call& call, AttentionStep& step) {
    const Tensor cosines = call.tensor(COS, "cos_cache"), sines = call.tensor(SIN, "sin_cache");
    demand(cosines.shape.size() == 2 && sines.shape == cosines.shape && cosines.size(1) <= step.dim / 2,
           "cos_cache and sin_cache are not [rows, at most head_dim / 2]");
    step.cosines = static_cast<const float*>(cosines.data);
    step.sines = static_cast<const float*>(sines.data);
    step.half = cosines.size(1);
    return cosines.size(0);
  }

  // Three inputs, or one that holds them side by side. Returns the width of the queries of one row. Where a step has
  // rows, its queries are in memory: no product of their sizes wraps.
  size_t read_rows(const Call& call, const Tensor& query, AttentionStep& step) const {
    const auto found = checked_product({heads, step.dim}), found_kv = checked_product({kv_heads, step.dim});
    const auto all = found && found_kv ? checked_sum({*found, *found_kv, *found_kv}) : std::nullopt;
    demand(all.has_value(), "num_heads ", heads, " of head_dim ", step.dim, " ask for more memory than can be addressed");
    const size_t width = *found, kv_width = *found_kv;
    const OrtValue *key = call.input(KEY), *value = call.input(VALUE);
    step.queries = static_cast<const float*>(query.data);
    if (!key && !value) {
      demand(query.size(2) == *all, "query is not (num_heads + 2 * kv_num_heads) * head_dim wide");
      step.query_stride = step.kv_stride = *all;
      if (step.rows && query.size(0)) {
        step.keys = step.queries + width;
        step.values = step.keys + kv_width;
      }
      return width;
    }
    demand(key && value, "key without value, or value without key");
    const Tensor keys = call.tensor(KEY, "key"), values = call.tensor(VALUE, "value");
    const std::vector<int64_t> wanted{query.shape[0], query.shape[1], static_cast<int64_t>(kv_width)};
    demand(query.size(2) == width && keys.shape == wanted && values.shape == wanted,
           "query is not num_heads * head_dim wide, or key or value not kv_num_heads * head_dim");
    step.query_stride = width;
    step.kv_stride = kv_width;
    step.keys = static_cast<const float*>(keys.data);
    step.values = static_cast<const float*>(values.data);
    return width;
  }

  // The buffer to write to: the past's own, or a copy of it.
  static float* present(const Call& call, Output index, const Tensor& past) {
    float* out = call.output(index, past.shape);
    const size_t count = past.count();
    if (count && out != past.data) std::memcpy(out, past.data, count * sizeof(float));
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
