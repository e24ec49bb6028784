#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "matmul/weights.h"

namespace pard {
namespace {

constexpr size_t MOST_QUERIES = 96;  // of a unit: more would leave the core's cache, fewer transpose the keys more often
constexpr size_t LEAST_QUERIES = 12;
constexpr size_t ALONE = 1 << 18;    // products up to which sharing them takes longer than it saves
constexpr size_t FEW_ROWS = 32;      // whose keys and values one thread appends

// Halves of a head turned against one another, times `scale`; the rest of it times `scale`. Plain products and sums,
// so that every compiler and processor rounds alike.
void rotate(const float* __restrict x, const float* __restrict cosines, const float* __restrict sines, size_t half,
            size_t dim, float scale, float* __restrict out) {
  for (size_t i = 0; i < half; ++i) {
    out[i] = (x[i] * cosines[i] - x[half + i] * sines[i]) * scale;
    out[half + i] = (x[half + i] * cosines[i] + x[i] * sines[i]) * scale;
  }
  for (size_t i = 2 * half; i < dim; ++i) out[i] = x[i] * scale;
}

// Memory of one thread, kept from call to call.
AttendScratch scratch_of_thread(size_t dim, size_t count) {
  static thread_local std::unique_ptr<Buffer> buffer;
  static thread_local size_t size = 0;
  const size_t rows = whole_panels(count), floats = dim * KEYS + rows * (KEYS + 2 * dim + PANEL + 1);
  if (size < floats) {
    buffer = std::make_unique<Buffer>(floats * sizeof(float));
    size = floats;
  }
  AttendScratch out;
  out.keys = reinterpret_cast<float*>(buffer->data());
  out.queries = out.keys + dim * KEYS;
  out.scores = out.queries + rows * dim;
  out.values = out.scores + rows * KEYS;
  out.sums = out.values + rows * dim;
  out.highest = out.sums + rows * PANEL;
  return out;
}

// First keys and values go into the caches, then workers share units: runs of queries of one KV head.
class Work {
 public:
  Work(const Isa& isa, const AttentionStep& step)
      : isa_(isa), step_(step), group_(step.heads / step.kv_heads), chunks_(chunking(step)) {}

  size_t workers() const {
    const size_t past = step_.window ? std::min(step_.past, step_.window) : step_.past;
    const auto queries = static_cast<double>(step_.rows * step_.heads * step_.dim);
    const double products = queries * static_cast<double>(past + step_.rows);
    return products > ALONE ? std::min(units(), processors()) : 1;
  }

  static void append(void* self, size_t row) { static_cast<Work*>(self)->append(row); }
  static void work(void* self, size_t) { static_cast<Work*>(self)->work(); }

  // After the work: throws if a worker's memory was refused.
  void finish() const {
    if (refused_) throw std::bad_alloc();
  }

 private:
  // Units enough for all threads, but no smaller than they must be: each transposes the keys anew.
  static Tiling chunking(const AttentionStep& step) {
    const size_t count = step.rows * (step.heads / step.kv_heads);
    const size_t wanted = (processors() + step.kv_heads - 1) / step.kv_heads;
    const size_t size = std::max((count + wanted - 1) / wanted, LEAST_QUERIES);
    return {count, std::min(size, MOST_QUERIES)};
  }

  size_t units() const { return step_.kv_heads * chunks_.tiles; }

  void append(size_t row) {
    const AttentionStep& s = step_;
    for (size_t h = 0; h < s.kv_heads; ++h) {
      const size_t at = (h * s.capacity + s.past + row) * s.dim, from = row * s.kv_stride + h * s.dim;
      rotate(s.keys + from, row, 1.0f, s.key_cache + at);
      std::memcpy(s.value_cache + at, s.values + from, s.dim * sizeof(float));
    }
  }

  void rotate(const float* head, size_t row, float scale, float* out) const {
    const size_t at = (step_.past + row) * step_.half;
    pard::rotate(head, step_.cosines + at, step_.sines + at, step_.half, step_.dim, scale, out);
  }

  // The threads are not this library's, so no exception may leave a worker.
  void work() {
    try {
      for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < units();) attend(units() - 1 - i);
    } catch (const std::bad_alloc&) {
      refused_ = true;
    }
  }

  // Units of the last rows, which see the most keys, come last and are taken first.
  void attend(size_t unit) {
    const AttentionStep& s = step_;
    const size_t head = unit % s.kv_heads, chunk = unit / s.kv_heads;
    const size_t first = chunks_.first(chunk), count = chunks_.height(chunk);
    QueryRows job;
    job.keys = s.key_cache + head * s.capacity * s.dim;
    job.values = s.value_cache + head * s.capacity * s.dim;
    job.dim = s.dim;
    job.first = first;
    job.count = count;
    job.group = group_;
    job.past = s.past;
    job.window = s.window;
    job.out = s.out + head * group_ * s.dim;
    job.stride = s.heads * s.dim;
    job.scratch = scratch_of_thread(s.dim, count);
    for (size_t i = 0; i < count; ++i) {
      const size_t row = (first + i) / group_, query = head * group_ + (first + i) % group_;
      rotate(s.queries + row * s.query_stride + query * s.dim, row, s.scale, job.scratch.queries + i * s.dim);
    }
    isa_.attend(job);
  }

  const Isa& isa_;
  const AttentionStep& step_;
  size_t group_;
  Tiling chunks_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> refused_{false};
};

}  // namespace

void attention(const Isa& isa, const AttentionStep& step, const Parallel& parallel) {
  if (!step.rows) return;
  Work work(isa, step);
  if (step.rows > FEW_ROWS)
    parallel.run(parallel.context, Work::append, step.rows, &work);
  else
    for (size_t row = 0; row < step.rows; ++row) Work::append(&work, row);
  if (work.workers() > 1)
    parallel.run(parallel.context, Work::work, work.workers(), &work);
  else
    Work::work(&work, 0);
  work.finish();
}

}  // namespace pard
