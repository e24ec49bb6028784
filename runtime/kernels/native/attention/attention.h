// Grouped-query attention of a step on a KV cache, on whatever threads the caller has.
#pragma once

#include "isa/isa.h"
#include "ort/parallel.h"

namespace pard {

// Rows of one sequence, tokens past .. past + rows - 1. Key and value of each are written into the caches before any
// row attends.
struct AttentionStep {
  size_t heads, kv_heads, dim;
  size_t rows, past;
  const float *queries, *keys, *values;  // [rows], each `heads` or `kv_heads` times dim
  size_t query_stride, kv_stride;        // from one row to the next
  const float *cosines, *sines;          // [position][half]: rotary tables
  size_t half;                           // 0: nothing is turned
  float scale;
  float *key_cache, *value_cache;  // [kv_heads][capacity][dim]
  size_t capacity;
  float* out;     // [rows][heads * dim]
  size_t window;  // how many keys a row sees at most, its own included; 0: all of them
};

// A row's result does not depend on `rows` nor on the threads. dim is a multiple of PANEL, kv_heads divides heads.
void attention(const Isa& isa, const AttentionStep& step, const Parallel& parallel);

}  // namespace pard
