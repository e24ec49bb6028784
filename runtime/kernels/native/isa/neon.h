// Primitives of NEON's 128-bit registers, shared by the instruction sets of Arm: 4 outputs a register, four registers a
// panel. Included after target_begin.h.
#pragma once

#include <arm_neon.h>

#include "isa/isa.h"

namespace pard {
namespace {

struct Neon {
  using Int = int32x4_t;
  using Float = float32x4_t;
  static constexpr size_t LANES = 4;
  static constexpr size_t HIGHEST_TILE = 6;  // 32 registers: 24 sums, weights, activations; the results spill
#if defined(__clang__)
  static constexpr size_t ROWS = 6;  // of attention: 24 sums
#else
  static constexpr size_t ROWS = 4;  // GCC 12 writes the sums of more rows to memory in every turn of the loop
#endif
  static constexpr size_t WIDEST = 4;

  static void prefetch(const uint8_t* at) { __builtin_prefetch(at); }
  static void prefetch_far(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }
  // Loads stay on their side of it: GCC would load several lines at once, more than there are registers.
  static void keep_loads() { __asm__ volatile("" ::: "memory"); }
  static Float zero() { return vdupq_n_f32(0); }
  static Float load(const float* at) { return vld1q_f32(at); }
  static Float load_halves(const uint8_t* at) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))); }
  static void store(float* at, Float x) { vst1q_f32(at, x); }
  static Int broadcast(int32_t x) { return vdupq_n_s32(x); }
  static Float broadcast(float x) { return vdupq_n_f32(x); }
  static float factor(float x) { return x; }  // of fma, which multiplies by one lane of a register
  static Int widen(const uint8_t* at) {
    uint32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))));
  }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Int multiply_int(Int a, Int b) { return vmulq_s32(a, b); }
  static Int max_int(Int a, Int b) { return vmaxq_s32(a, b); }
  static Int magnitude_bits(Float x) { return vreinterpretq_s32_f32(vabsq_f32(x)); }
  static int32_t largest(Int x) { return vmaxvq_s32(x); }
  static int32_t total(Int x) { return vaddvq_s32(x); }
  static Float to_float(Int x) { return vcvtq_f32_s32(x); }
  static Int round(Float x) { return vcvtnq_s32_f32(x); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float fma(float a, Float b, Float c) { return vfmaq_n_f32(c, b, a); }
  static Float fma(Float a, float b, Float c) { return vfmaq_n_f32(c, a, b); }
  static Float divide(Float a, Float b) { return vdivq_f32(a, b); }
  // The second operand where one is NaN, as on x86; Arm's own instructions give NaN.
  static Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static float largest_float(Float x) { return vmaxvq_f32(x); }
  static Float zip_low(Float a, Float b) { return vzip1q_f32(a, b); }
  static Float zip_high(Float a, Float b) { return vzip2q_f32(a, b); }
  static Float power_of_two(Int n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
  static void store_bytes(int8_t* at, Int x) {
    const int16x4_t words = vmovn_s32(x);
    const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
    memcpy(at, &bytes, sizeof bytes);
  }
};

// The whole-number sums of R rows times one panel (see VectorSums), from dot products by a lane: a register holds the
// activations of up to four rows, and each vector of weights is unpacked for all rows, then forgotten.
// D has the dot product, and says how levels of 8 bits are read.
template <class D, int BITS, size_t R>
struct LaneSums {
  static constexpr size_t V = PANEL / Neon::LANES;
  static constexpr size_t LINES = 1;
  static constexpr int LOWEST_LEVEL = BITS == 8 ? D::LOWEST_LEVEL : 0;
  static constexpr size_t CHAINS = BITS == 4 && R <= 2 ? 2 : 1;  // of a sum: few rows would wait for their last product

  struct Sum {
    int32x4_t chains[CHAINS];

    void start(int32x4_t x) {
      chains[0] = x;
      if constexpr (CHAINS > 1) chains[1] = vdupq_n_s32(0);
    }
    void flush() {}
    int32x4_t total() const { return CHAINS > 1 ? vaddq_s32(chains[0], chains[CHAINS - 1]) : chains[0]; }
  };
  using State = Sum[R][V];

  // A group of activations of each row, four rows a register; nothing beyond the last row is read.
  struct Groups {
    int8x16_t of[(R + 3) / 4];

    explicit Groups(const int8_t* rows) {
      for (size_t i = 0; i < R / 4; ++i) of[i] = vld1q_s8(rows + i * 4 * GROUP);
      if constexpr (R % 4 != 0) of[R / 4] = load_some<R % 4>(rows + R / 4 * 4 * GROUP);
    }

    template <size_t COUNT>
    static int8x16_t load_some(const int8_t* rows) {
      int32x4_t out = vdupq_n_s32(0);
      if constexpr (COUNT == 1) {
        out = vsetq_lane_s32(load_group(rows), out, 0);
      } else {
        out = vreinterpretq_s32_s8(vcombine_s8(vld1_s8(rows), vdup_n_s8(0)));
        if constexpr (COUNT == 3) out = vsetq_lane_s32(load_group(rows + 2 * GROUP), out, 2);
      }
      return vreinterpretq_s8_s32(out);
    }
  };

  static void add(const uint8_t* weights, const int8_t* rows, State& sums) {
    Neon::prefetch(weights + PREFETCH);
    const Groups first(rows);
    if constexpr (BITS == 4) {
      const Groups second(rows + R * GROUP);
      for (size_t v = 0; v < V; ++v) {
        Neon::keep_loads();
        const uint8x16_t bytes = vld1q_u8(weights + v * 16);
        multiply<0>(vandq_u8(bytes, vdupq_n_u8(15)), first, v, sums);
        multiply<CHAINS - 1>(vshrq_n_u8(bytes, 4), second, v, sums);
      }
    } else {
      for (size_t v = 0; v < V; ++v) {
        Neon::keep_loads();
        multiply<0>(D::byte_levels(vld1q_u8(weights + v * 16)), first, v, sums);
      }
    }
    Neon::keep_loads();
  }

  template <size_t CHAIN, size_t ROW = 0>
  static void multiply(uint8x16_t levels, const Groups& groups, size_t v, State& sums) {
    if constexpr (ROW < R) {
      int32x4_t& sum = sums[ROW][v].chains[CHAIN];
      sum = D::template dot<ROW % 4>(sum, levels, groups.of[ROW / 4]);
      multiply<CHAIN, ROW + 1>(levels, groups, v, sums);
    }
  }
};

}  // namespace
}  // namespace pard
