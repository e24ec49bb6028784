// Primitives of 256-bit registers, shared by AVX2 and AVX-VNNI: 8 outputs a register, two registers a panel.
#pragma once

#include <immintrin.h>

#include "isa/isa.h"

namespace pard {
namespace {

struct Vector256 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr size_t LANES = 8;
  static constexpr size_t HIGHEST_TILE = 4;  // 16 registers: 8 sums, weights, activations; the results spill
  static constexpr size_t ROWS = 4, WIDEST = 2;  // of attention: 8 sums

  static void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
  static void prefetch_far(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }
  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* at) { return _mm256_loadu_ps(at); }
  static Float load_halves(const uint8_t* at) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))); }
  static Int load_bytes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(at)); }
  static void store(float* at, Float x) { _mm256_storeu_ps(at, x); }
  static Int broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float factor(float x) { return broadcast(x); }  // of fma, as its first operand
  static Int widen(const uint8_t* at) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int multiply_int(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static Int magnitude_bits(Float x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
  static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  static Int round(Float x) { return _mm256_cvtps_epi32(x); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float power_of_two(Int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  static Float zip_low(Float a, Float b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static Float zip_high(Float a, Float b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  static float largest_float(Float x) {
    __m128 out = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    out = _mm_max_ps(out, _mm_movehl_ps(out, out));
    return _mm_cvtss_f32(_mm_max_ss(out, _mm_shuffle_ps(out, out, 1)));
  }

  static int32_t largest(Int x) {
    __m128i out = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    out = _mm_max_epi32(out, _mm_shuffle_epi32(out, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_max_epi32(out, _mm_shuffle_epi32(out, _MM_SHUFFLE(2, 3, 0, 1))));
  }
  static int32_t total(Int x) {
    __m128i out = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    out = _mm_add_epi32(out, _mm_shuffle_epi32(out, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(out, _mm_shuffle_epi32(out, _MM_SHUFFLE(2, 3, 0, 1))));
  }
  static void store_bytes(int8_t* at, Int x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packs_epi16(words, words));
  }

  // The two halves of every byte, as levels 0..15.
  struct Nibbles {
    Int low, high;
  };
  static Nibbles nibbles(const uint8_t* at) {
    const Int bytes = load_bytes(at), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
  }
};

}  // namespace
}  // namespace pard
