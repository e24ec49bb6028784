// The kernels of all vector instruction sets: one template over a set of primitives S (see gemm_avx512vnni.cpp).
// Included after target_begin.h; every other header comes before it. So no inline function of theirs is compiled for
// a newer processor and then, merged by the linker, run on an older one; what is here has internal linkage.
#pragma once

#include <string.h>

#include "isa/isa.h"

namespace pard {
namespace {

constexpr size_t PREFETCH = 12288;  // bytes ahead in the weight stream: 2 KiB took 1.3 times as long at 9 rows
constexpr size_t UNROLL = 4;       // lines; every block has a multiple of them
constexpr uint32_t SMALLEST_PEAK_BITS = 0x03000000;  // 2^-121: below it 127 / peak overflows; such blocks are zeros
constexpr uint32_t INFINITY_BITS = 0x7f800000;
constexpr uint32_t NAN_BITS = 0x7fc00000;

inline float as_float(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

inline int32_t load_group(const int8_t* levels) {
  int32_t out;
  memcpy(&out, levels, sizeof out);
  return out;
}

// What stands for zero among the levels of weights: the middle level, a zero point for each block, or level 0, to which
// a minimum for each block is added.
enum class Zero { middle, points, minimums };

// The whole-number sums of R rows times one panel, where an instruction multiplies a vector of weight levels by the
// same four activations: a Sum of the instruction set for each row and vector. An instruction set's `Sums` is this, or
// has the same members.
template <class S, int BITS, size_t R>
struct VectorSums {
  using Int = typename S::Int;
  using Sum = typename S::template Sum<BITS, R>;
  static constexpr size_t V = PANEL / S::LANES;       // vectors
  static constexpr size_t STEPS = BITS == 4 ? 2 : 1;  // groups of activations a line takes
  static constexpr size_t LINES = 1;                  // of weights that `add` takes
  static constexpr int LOWEST_LEVEL = 0;              // of weights, as the instructions read them
  using State = Sum[R][V];

  static void add(const uint8_t* weights, const int8_t* rows, State& sums) {
    typename Sum::Levels levels[V];
    S::prefetch(weights + PREFETCH);
    for (size_t v = 0; v < V; ++v) levels[v] = Sum::load(weights + v * (LINE / V));
    for (size_t r = 0; r < R; ++r) {
      Int groups[STEPS];
      for (size_t s = 0; s < STEPS; ++s) groups[s] = S::broadcast(load_group(rows + (s * R + r) * GROUP));
      for (size_t v = 0; v < V; ++v) sums[r][v].add(levels[v], groups);
    }
  }
};

// R rows times one panel, over all blocks. Every output is one chain of fused multiply-adds in block order,
// whatever R is: so a row does not depend on its neighbours. One panel at a time, as one stream of weights is what
// memory serves best: two or four side by side were a quarter slower at 1..6 rows.
template <class S, int BITS, Zero ZERO, size_t R>
struct Panel {
  using Int = typename S::Int;
  using Float = typename S::Float;
  using Sums = typename S::template Sums<BITS, R>;
  using State = typename Sums::State;
  static constexpr size_t V = PANEL / S::LANES;       // vectors
  static constexpr size_t STEPS = BITS == 4 ? 2 : 1;  // groups of activations a line takes

  static void start(const Tile& tile, size_t panel, size_t b, State& sums) {
    const int32_t* offsets = tile.rows.offsets + b * R;
    for (size_t v = 0; v < V; ++v) {
      if constexpr (ZERO == Zero::points) {
        Int zeros = S::widen(tile.zeros + (panel * tile.blocks + b) * PANEL + v * S::LANES);
        if constexpr (Sums::LOWEST_LEVEL != 0) zeros = S::add(zeros, S::broadcast(int32_t{Sums::LOWEST_LEVEL}));
        for (size_t r = 0; r < R; ++r) sums[r][v].start(S::multiply_int(S::broadcast(offsets[r]), zeros));
      } else if constexpr (Sums::LOWEST_LEVEL != 0) {  // what is zero among the levels is read as 0
        for (size_t r = 0; r < R; ++r) sums[r][v].start(S::broadcast(int32_t{0}));
      } else {
        for (size_t r = 0; r < R; ++r) sums[r][v].start(S::broadcast(offsets[r]));
      }
    }
  }

  // line: what follows a block's levels.
  static Float load_scale(const uint8_t* line, size_t v) {
    if constexpr (ZERO == Zero::minimums)
      return S::load_halves(line + v * S::LANES * sizeof(uint16_t));
    else
      return S::load(reinterpret_cast<const float*>(line) + v * S::LANES);
  }

  static void add_minimums(const uint8_t* line, const float* block_sums, Float (&out)[R][V]) {
    for (size_t v = 0; v < V; ++v) {
      const Float minimum = S::load_halves(line + (PANEL + v * S::LANES) * sizeof(uint16_t));
      for (size_t r = 0; r < R; ++r) out[r][v] = S::fma(minimum, S::factor(block_sums[r]), out[r][v]);
    }
  }

  static void run(const Tile& tile, size_t panel) {
    const size_t lines = tile.format.block * BITS / 32;
    const uint8_t* weights = tile.weights + panel * tile.panel_bytes;
    const int8_t* rows = tile.rows.levels;
    Float out[R][V];
    for (size_t r = 0; r < R; ++r)
      for (size_t v = 0; v < V; ++v) out[r][v] = S::zero();
    for (size_t b = 0; b < tile.blocks; ++b) {
      State sums;
      start(tile, panel, b, sums);
      size_t l = 0;
      do {
        for (size_t u = 0; u < UNROLL; u += Sums::LINES)
          Sums::add(weights + u * LINE, rows + u * STEPS * R * GROUP, sums);
        for (size_t r = 0; r < R; ++r)
          for (size_t v = 0; v < V; ++v) sums[r][v].flush();
        weights += UNROLL * LINE;
        rows += UNROLL * STEPS * R * GROUP;
      } while ((l += UNROLL) < lines);
      const float* scales = tile.rows.scales + b * R;
      for (size_t v = 0; v < V; ++v) {
        const Float scale = load_scale(weights, v);
        for (size_t r = 0; r < R; ++r)
          out[r][v] = S::fma(S::multiply(S::to_float(sums[r][v].total()), scale), S::factor(scales[r]), out[r][v]);
      }
      if constexpr (ZERO == Zero::minimums) add_minimums(weights, tile.rows.sums + b * R, out);
      weights += LINE;
    }
    for (size_t v = 0; v < V; ++v) {
      const size_t at = panel * PANEL + v * S::LANES;
      const Float bias = tile.bias ? S::load(tile.bias + at) : S::zero();
      for (size_t r = 0; r < R; ++r) S::store(tile.sums + r * tile.stride + at, S::add(out[r][v], bias));
    }
  }
};

template <class S, int BITS, Zero ZERO, size_t R>
void multiply_rows(const Tile& tile) {
  for (size_t panel = 0; panel < tile.panels; ++panel) Panel<S, BITS, ZERO, R>::run(tile, panel);
}

// The tile's height picks the instantiation.
template <class S, int BITS, Zero ZERO, size_t R = S::HIGHEST_TILE>
void multiply_height(const Tile& tile) {
  if constexpr (R > 0) {
    if (tile.height == R)
      multiply_rows<S, BITS, ZERO, R>(tile);
    else
      multiply_height<S, BITS, ZERO, R - 1>(tile);
  }
}

template <class S>
void multiply(const Tile& tile) {
  if (tile.format.minimums)
    multiply_height<S, 4, Zero::minimums>(tile);
  else if (tile.format.bits == 4)
    tile.zeros ? multiply_height<S, 4, Zero::points>(tile) : multiply_height<S, 4, Zero::middle>(tile);
  else
    tile.zeros ? multiply_height<S, 8, Zero::points>(tile) : multiply_height<S, 8, Zero::middle>(tile);
}

// The bits of the largest magnitude. As integers NaN is above infinity, and infinity above the rest.
template <class S>
uint32_t peak_bits(const float* source, size_t count) {
  typename S::Int peak = S::broadcast(int32_t{0});
  for (size_t k = 0; k < count; k += S::LANES) peak = S::max_int(peak, S::magnitude_bits(S::load(source + k)));
  return static_cast<uint32_t>(S::largest(peak));
}

// One block of one row; returns the sum of its levels.
template <class S>
int32_t quantize_block(const float* source, size_t count, float inverse, int8_t* target, size_t stride) {
  typename S::Int sum = S::broadcast(int32_t{0});
  for (size_t k = 0; k < count; k += S::LANES) {
    const typename S::Int levels = S::round(S::multiply(S::load(source + k), S::broadcast(inverse)));
    sum = S::add(sum, levels);
    int8_t bytes[S::LANES];
    S::store_bytes(bytes, levels);
    for (size_t g = 0; g < S::LANES; g += GROUP) memcpy(target + (k + g) / GROUP * stride, bytes + g, GROUP);
  }
  return S::total(sum);
}

template <class S>
void quantize(const QuantizeRow& job) {
  const size_t stride = job.height * GROUP;
  for (size_t b = 0; b < job.blocks; ++b) {
    const float* source = job.source + b * job.block;
    int8_t* target = job.target.levels + b * job.block * job.height + job.row * GROUP;
    const uint32_t peak = peak_bits<S>(source, job.block);
    // Too small for a scale: zeros. Infinite or NaN: levels of zero times a scale of NaN, so the row's results are NaN.
    const bool regular = peak >= SMALLEST_PEAK_BITS && peak < INFINITY_BITS;
    const float largest = as_float(peak);
    int32_t sum = 0;
    if (regular) {
      sum = quantize_block<S>(source, job.block, LARGEST_LEVEL / largest, target, stride);
    } else {
      for (size_t k = 0; k < job.block; k += GROUP) memset(target + k / GROUP * stride, 0, GROUP);
    }
    const size_t at = b * job.height + job.row;
    const float scale = regular ? largest / LARGEST_LEVEL : peak < INFINITY_BITS ? 0.0f : as_float(NAN_BITS);
    job.target.scales[at] = scale;
    if (job.target.sums) job.target.sums[at] = scale * static_cast<float>(sum);
    job.target.offsets[at] = -sum * job.sum_factor;
  }
}

}  // namespace
}  // namespace pard
