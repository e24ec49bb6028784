#include "isa/architecture.h"
#if defined(PARD_X86_64)
#include "isa/cpu.h"

#include <cstdint>

#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace pard {
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers out;
#if defined(_MSC_VER)
  int values[4];
  __cpuid(values, 0);
  if (static_cast<uint32_t>(values[0]) < leaf) return out;
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
  out = {static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1]), static_cast<uint32_t>(values[2]),
         static_cast<uint32_t>(values[3])};
#else
  __get_cpuid_count(leaf, subleaf, &out.a, &out.b, &out.c, &out.d);
#endif
  return out;
}

// The register states that the operating system saves; only valid where it says so (OSXSAVE).
uint64_t saved_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

bool bit(uint32_t word, int index) { return word >> index & 1; }

// Intel's manual, volume 2, CPUID. States: 1 and 2 are SSE and AVX, 5..7 the masks and registers of AVX-512.
struct Features {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false;

  Features() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    if (!bit(one.c, 27)) return;  // OSXSAVE
    const uint64_t states = saved_states();
    const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6;
    avx2 = ymm && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);  // FMA, F16C, AVX2
    avx_vnni = avx2 && bit(more.a, 4);
    const bool avx512 = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);  // F, DQ, BW, VL
    avx512_vnni = avx2 && zmm && avx512 && bit(seven.c, 11);
  }
};

const Features& features() {
  static const Features out;
  return out;
}

}  // namespace

bool cpu_has_avx2() { return features().avx2; }
bool cpu_has_avx_vnni() { return features().avx_vnni; }
bool cpu_has_avx512_vnni() { return features().avx512_vnni; }

}  // namespace pard

#endif
