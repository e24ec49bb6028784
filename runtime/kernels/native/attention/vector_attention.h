// Attention over the primitives S of an instruction set; every S rounds alike. Included as vector_tile.h is.
#pragma once

#include "isa/isa.h"
#include "isa/silu.h"

namespace pard {
namespace {

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float UNSEEN = -std::numeric_limits<float>::infinity();
constexpr float LEAST_EXPONENT = -88.0f;  // its exponential() is a multiple of 2^-127, which is written as 0

// c[R][W vectors] += a[R][depth] times b[depth][W vectors]. An element is one chain of fused multiply-adds in order
// of depth, whatever R and W are.
template <class S, size_t R, size_t W>
void multiply_add(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth, float* c, size_t c_stride) {
  typename S::Float sums[R][W];
  for (size_t r = 0; r < R; ++r)
    for (size_t w = 0; w < W; ++w) sums[r][w] = S::load(c + r * c_stride + w * S::LANES);
  for (size_t k = 0; k < depth; ++k, b += b_stride) {
    typename S::Float line[W];
    for (size_t w = 0; w < W; ++w) line[w] = S::load(b + w * S::LANES);
    for (size_t r = 0; r < R; ++r) {
      const auto x = S::factor(a[r * a_stride + k]);
      for (size_t w = 0; w < W; ++w) sums[r][w] = S::fma(x, line[w], sums[r][w]);
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t w = 0; w < W; ++w) S::store(c + r * c_stride + w * S::LANES, sums[r][w]);
}

// `width` columns, a multiple of PANEL, the widest pieces first.
template <class S, size_t R, size_t W = S::WIDEST>
void multiply_columns(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth, float* c,
                      size_t c_stride, size_t width) {
  constexpr size_t COLUMNS = W * S::LANES;
  for (; width >= COLUMNS; width -= COLUMNS, b += COLUMNS, c += COLUMNS)
    multiply_add<S, R, W>(a, a_stride, b, b_stride, depth, c, c_stride);
  if constexpr (COLUMNS > PANEL)
    if (width) multiply_columns<S, R, W / 2>(a, a_stride, b, b_stride, depth, c, c_stride, width);
}

// The number of rows picks the instantiation.
template <class S, size_t R = S::ROWS>
void multiply_some(size_t rows, const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth,
                   float* c, size_t c_stride, size_t width) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply_columns<S, R>(a, a_stride, b, b_stride, depth, c, c_stride, width);
    else
      multiply_some<S, R - 1>(rows, a, a_stride, b, b_stride, depth, c, c_stride, width);
  }
}

// Keys [count][dim] to [dim][KEYS]; columns up to the next multiple of PANEL repeat the last key.
template <class S>
void transpose(const float* keys, size_t count, size_t dim, float* target) {
  constexpr size_t L = S::LANES;
  for (size_t first = 0; first < whole_panels(count); first += L)
    for (size_t d = 0; d < dim; d += L) {
      typename S::Float square[L], next[L];
      for (size_t i = 0; i < L; ++i) square[i] = S::load(keys + (first + i < count ? first + i : count - 1) * dim + d);
      for (size_t step = 1; step < L; step *= 2) {  // each shuffles the rows' halves like cards; log2 L of them transpose
        for (size_t i = 0; i < L / 2; ++i) {
          next[2 * i] = S::zip_low(square[i], square[i + L / 2]);
          next[2 * i + 1] = S::zip_high(square[i], square[i + L / 2]);
        }
        for (size_t i = 0; i < L; ++i) square[i] = next[i];
      }
      for (size_t i = 0; i < L; ++i) S::store(target + (d + i) * KEYS + first, square[i]);
    }
}

// A unit of work: its rows' attention, block by block of KEYS keys from position 0. A row's state is the highest score
// so far, the sum of its weights in PANEL lanes and the weighted values, both relative to the highest score.
template <class S>
struct Attend {
  using Float = typename S::Float;
  static constexpr size_t L = S::LANES;

  static void run(const QueryRows& job) {
    for (size_t r = 0; r < job.count; ++r) {
      job.scratch.highest[r] = LOWEST;
      memset(job.scratch.sums + r * PANEL, 0, PANEL * sizeof(float));
      memset(job.scratch.values + r * job.dim, 0, job.dim * sizeof(float));
    }
    const size_t end = seen(job, job.count - 1);
    size_t rows = 0, last = 0;  // those whose keys end before the block, and those whose window begins before its end
    for (size_t first = hidden(job, 0) / KEYS * KEYS; first < end; first += KEYS) {
      while (seen(job, rows) <= first) ++rows;
      while (last < job.count && hidden(job, last) < first + KEYS) ++last;
      block(job, first, rows, last);
    }
    for (size_t r = 0; r < job.count; ++r) finish(job, r);
  }

 private:
  // How many keys a row sees: those up to its own.
  static size_t seen(const QueryRows& job, size_t row) { return job.past + (job.first + row) / job.group + 1; }

  // How many keys lie before its window.
  static size_t hidden(const QueryRows& job, size_t row) {
    const size_t end = seen(job, row);
    return job.window && end > job.window ? end - job.window : 0;
  }

  // Of the block that begins at `first`.
  static size_t seen(const QueryRows& job, size_t row, size_t first) {
    const size_t count = seen(job, row) - first;
    return count < KEYS ? count : KEYS;
  }

  static size_t hidden(const QueryRows& job, size_t row, size_t first) {
    const size_t count = hidden(job, row);
    return count > first ? count - first : 0;
  }

  // For the rows from `row` to before `last`: each sees some of the block's keys.
  static void block(const QueryRows& job, size_t first, size_t row, size_t last) {
    const AttendScratch& scratch = job.scratch;
    const size_t dim = job.dim, most = seen(job, last - 1, first);
    const size_t left = seen(job, job.count - 1) - first, next = left < 2 * KEYS ? left : 2 * KEYS;
    transpose<S>(job.keys + first * dim, most, dim, scratch.keys);
    memset(scratch.scores + row * KEYS, 0, (last - row) * KEYS * sizeof(float));
    const float* values = job.values + first * dim;
    const Tiling tiling(last - row, S::ROWS);
    for (size_t t = 0; t < tiling.tiles; ++t) {
      const size_t r = row + tiling.first(t), height = tiling.height(t);
      prefetch(values, most * dim, t, tiling.tiles);
      const size_t width = whole_panels(seen(job, r + height - 1, first));
      multiply_some<S>(height, scratch.queries + r * dim, dim, scratch.keys, KEYS, dim, scratch.scores + r * KEYS, KEYS, width);
    }
    for (size_t r = row; r < last; ++r) weigh(job, r, hidden(job, r, first), seen(job, r, first));
    for (size_t t = 0; t < tiling.tiles; ++t) {
      const size_t r = row + tiling.first(t), height = tiling.height(t);
      if (next > KEYS) prefetch(job.keys + (first + KEYS) * dim, (next - KEYS) * dim, t, tiling.tiles);
      // Runs of keys that the same rows see, from the row `ended` to before `begun`: without a window all of them, then
      // fewer and fewer. What a row does not see, it does not touch.
      const size_t end = seen(job, r + height - 1, first);
      for (size_t from = hidden(job, r, first), to, ended = 0, begun = 0; from < end; from = to) {
        while (seen(job, r + ended, first) <= from) ++ended;
        while (begun < height && hidden(job, r + begun, first) <= from) ++begun;
        to = seen(job, r + ended, first);
        if (begun < height && hidden(job, r + begun, first) < to) to = hidden(job, r + begun, first);
        if (begun > ended)
          multiply_some<S>(begun - ended, scratch.scores + (r + ended) * KEYS + from, KEYS, values + from * dim, dim,
                           to - from, scratch.values + (r + ended) * dim, dim, dim);
      }
    }
  }

  // One part of what is needed soon, so that it comes while the processor multiplies. Into the second cache: the first
  // one is full of what is being multiplied.
  static void prefetch(const float* at, size_t count, size_t part, size_t parts) {
    const size_t lines = count / PANEL, end = lines * (part + 1) / parts;
    for (size_t i = lines * part / parts; i < end; ++i) S::prefetch_far(reinterpret_cast<const uint8_t*>(at + i * PANEL));
  }

  // A row's scores of one block, of the keys from `from` to before `count`, to weights exp(score - highest); what was
  // summed before is rescaled to a new highest.
  static void weigh(const QueryRows& job, size_t row, size_t from, size_t count) {
    float* const scores = job.scratch.scores + row * KEYS;
    const size_t width = whole_panels(count);
    for (size_t k = 0; k < from; ++k) scores[k] = UNSEEN;
    for (size_t k = count; k < width; ++k) scores[k] = UNSEEN;
    Float most = S::load(scores);
    for (size_t k = L; k < width; k += L) most = S::max(most, S::load(scores + k));
    raise(job, row, S::largest_float(most));
    const Float shift = S::broadcast(-job.scratch.highest[row]);
    Float lanes[PANEL / L];
    for (size_t v = 0; v < PANEL / L; ++v) lanes[v] = S::load(job.scratch.sums + row * PANEL + v * L);
    for (size_t k = 0; k < width; k += PANEL)
      for (size_t v = 0; v < PANEL / L; ++v) {
        float* const at = scores + k + v * L;
        const Float found = weight(S::add(S::load(at), shift));
        S::store(at, found);
        lanes[v] = S::add(lanes[v], found);
      }
    for (size_t v = 0; v < PANEL / L; ++v) S::store(job.scratch.sums + row * PANEL + v * L, lanes[v]);
  }

  // exp of x <= 0, but 0 at -88 and below; NaN of NaN, as of two operands of which one is NaN `max` and `min` give the
  // second. Above 0 is x only in rows with NaN.
  static Float weight(Float x) {
    return exponential<S>(S::min(S::broadcast(0.0f), S::max(S::broadcast(LEAST_EXPONENT), x)));
  }

  static void raise(const QueryRows& job, size_t row, float score) {
    float& highest = job.scratch.highest[row];
    if (!(score > highest)) return;
    const Float factor = weight(S::add(S::broadcast(highest), S::broadcast(-score)));
    highest = score;
    rescale(job.scratch.sums + row * PANEL, PANEL, factor);
    rescale(job.scratch.values + row * job.dim, job.dim, factor);
  }

  static void rescale(float* x, size_t count, Float factor) {
    for (size_t i = 0; i < count; i += L) S::store(x + i, S::multiply(S::load(x + i), factor));
  }

  static void finish(const QueryRows& job, size_t row) {
    float sum = 0;
    for (size_t i = 0; i < PANEL; ++i) sum += job.scratch.sums[row * PANEL + i];
    const size_t at = job.first + row;
    const float* values = job.scratch.values + row * job.dim;
    float* out = job.out + at / job.group * job.stride + at % job.group * job.dim;
    for (size_t i = 0; i < job.dim; i += L) S::store(out + i, S::divide(S::load(values + i), S::broadcast(sum)));
  }
};

template <class S>
void attend(const QueryRows& job) {
  Attend<S>::run(job);
}

}  // namespace
}  // namespace pard
