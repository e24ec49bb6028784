// AVX-VNNI: the dot product instruction of client processors without AVX-512.
#include "isa/architecture.h"
#if defined(PARD_X86_64)
#define PARD_TARGET "avx2,fma,f16c,avxvnni"
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

struct AvxVnni : Vector256 {
  template <int BITS, size_t ROWS>
  struct Sum;
  template <int BITS, size_t ROWS>
  using Sums = VectorSums<AvxVnni, BITS, ROWS>;
};

template <size_t ROWS>
struct AvxVnni::Sum<4, ROWS> {
  using Levels = Nibbles;
  Int value;

  static Levels load(const uint8_t* at) { return nibbles(at); }
  void start(Int x) { value = x; }
  void add(Levels w, const Int (&a)[2]) {
    value = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(value, w.low, a[0]), w.high, a[1]);
  }
  void flush() {}
  Int total() const { return value; }
};

template <size_t ROWS>
struct AvxVnni::Sum<8, ROWS> {
  using Levels = Int;
  Int value;

  static Levels load(const uint8_t* at) { return load_bytes(at); }
  void start(Int x) { value = x; }
  void add(Levels w, const Int (&a)[1]) { value = _mm256_dpbusd_avx_epi32(value, w, a[0]); }
  void flush() {}
  Int total() const { return value; }
};

}  // namespace

const Isa AVX_VNNI = {"avx-vnni", AvxVnni::HIGHEST_TILE, cpu_has_avx_vnni,
                  quantize<AvxVnni>, multiply<AvxVnni>, gate<AvxVnni>, attend<AvxVnni>};

}  // namespace pard
#include "isa/target_end.h"
#endif
