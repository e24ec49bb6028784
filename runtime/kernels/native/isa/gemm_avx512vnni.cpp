// AVX-512 with VNNI: 16 outputs a register, dot products of four inputs in one instruction.
#include "isa/architecture.h"
#if defined(PARD_X86_64)
#define PARD_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma"
#include <immintrin.h>
#include <string.h>

#include "isa/cpu.h"
#include "isa/isa.h"
#include "isa/target_begin.h"
#include "isa/silu.h"
#include "matmul/vector_tile.h"
#include "attention/vector_attention.h"

namespace pard {
namespace {

struct Avx512Vnni {
  using Int = __m512i;
  using Float = __m512;
  static constexpr size_t LANES = 16;
  static constexpr size_t HIGHEST_TILE = 12;  // 12 sums, 12 results, weights, scales: 16 rows spill
  static constexpr size_t SPLIT = 6;
  static constexpr size_t ROWS = 6, WIDEST = 4;  // of attention: 24 sums

  template <int BITS, size_t ROWS>
  struct Sum;
  template <int BITS, size_t ROWS>
  using Sums = VectorSums<Avx512Vnni, BITS, ROWS>;

  static void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
  static void prefetch_far(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }
  static Float zero() { return _mm512_setzero_ps(); }
  static Float load_halves(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static Float load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, Float x) { _mm512_storeu_ps(at, x); }
  static Int broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float factor(float x) { return broadcast(x); }  // of fma, as its first operand
  static Int widen(const uint8_t* at) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int multiply_int(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static Int magnitude_bits(Float x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
  static int32_t largest(Int x) { return _mm512_reduce_max_epi32(x); }
  static float largest_float(Float x) { return _mm512_reduce_max_ps(x); }
  static Float zip_low(Float a, Float b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
  }
  static Float zip_high(Float a, Float b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
  }
  static int32_t total(Int x) { return _mm512_reduce_add_epi32(x); }
  static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  static Int round(Float x) { return _mm512_cvtps_epi32(x); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float power_of_two(Int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
  static void store_bytes(int8_t* at, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(x));
  }
};

template <size_t ROWS>
struct Avx512Vnni::Sum<4, ROWS> {
  struct Levels {
    Int low, high;
  };
  Int value, other;

  static Levels load(const uint8_t* at) {
    const Int bytes = _mm512_loadu_si512(at), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
  }
  void start(Int x) {
    value = x;
    other = _mm512_setzero_si512();
  }
  void add(Levels w, const Int (&a)[2]) {
    value = _mm512_dpbusd_epi32(value, w.low, a[0]);
    Int& second = ROWS <= SPLIT ? other : value;
    second = _mm512_dpbusd_epi32(second, w.high, a[1]);
  }
  void flush() {}
  Int total() const { return ROWS <= SPLIT ? _mm512_add_epi32(value, other) : value; }
};

template <size_t ROWS>
struct Avx512Vnni::Sum<8, ROWS> {
  using Levels = Int;
  Int value;

  static Levels load(const uint8_t* at) { return _mm512_loadu_si512(at); }
  void start(Int x) { value = x; }
  void add(Levels w, const Int (&a)[1]) { value = _mm512_dpbusd_epi32(value, w, a[0]); }
  void flush() {}
  Int total() const { return value; }
};

}  // namespace

const Isa AVX512_VNNI = {"avx512-vnni", Avx512Vnni::HIGHEST_TILE, cpu_has_avx512_vnni,
                  quantize<Avx512Vnni>, multiply<Avx512Vnni>, gate<Avx512Vnni>, attend<Avx512Vnni>};

}  // namespace pard
#include "isa/target_end.h"
#endif
