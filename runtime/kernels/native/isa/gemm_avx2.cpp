// AVX2 with FMA. Its byte products add pairs into 16 bits, which saturate: levels of 0..15 leave room for the
// eight products of four lines (8 * 2 * 15 * 127 < 32768), and weights of 8 bits go in two halves.
#include "isa/architecture.h"
#if defined(PARD_X86_64)
#define PARD_TARGET "avx2,fma,f16c"
#include <immintrin.h>
#include <string.h>

#include "isa/cpu.h"
#include "isa/isa.h"
#include "isa/target_begin.h"
#include "isa/silu.h"
#include "isa/vector256.h"
#include "matmul/vector_tile.h"
#include "attention/vector_attention.h"

namespace pard {
namespace {

struct Avx2 : Vector256 {
  template <int BITS, size_t ROWS>
  struct Sum;
  template <int BITS, size_t ROWS>
  using Sums = VectorSums<Avx2, BITS, ROWS>;
};

template <size_t ROWS>
struct Avx2::Sum<4, ROWS> {
  using Levels = Nibbles;
  Int value, pairs;

  static Levels load(const uint8_t* at) { return nibbles(at); }
  void start(Int x) {
    value = x;
    pairs = _mm256_setzero_si256();
  }
  void add(Levels w, const Int (&a)[2]) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.low, a[0]));
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.high, a[1]));
  }
  void flush() {
    value = _mm256_add_epi32(value, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    pairs = _mm256_setzero_si256();
  }
  Int total() const { return value; }
};

template <size_t ROWS>
struct Avx2::Sum<8, ROWS> {
  using Levels = Nibbles;
  Int value, low, high;

  static Levels load(const uint8_t* at) { return nibbles(at); }
  void start(Int x) {
    value = x;
    low = high = _mm256_setzero_si256();
  }
  void add(Levels w, const Int (&a)[1]) {
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w.low, a[0]));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w.high, a[0]));
  }
  void flush() {
    value = _mm256_add_epi32(value, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    value = _mm256_add_epi32(value, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    low = high = _mm256_setzero_si256();
  }
  Int total() const { return value; }
};

}  // namespace

const Isa AVX2 = {"avx2", Avx2::HIGHEST_TILE, cpu_has_avx2, quantize<Avx2>, multiply<Avx2>, gate<Avx2>, attend<Avx2>};

}  // namespace pard
#include "isa/target_end.h"
#endif
