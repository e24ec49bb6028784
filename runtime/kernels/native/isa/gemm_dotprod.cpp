// NEON with dot products of int8 (Armv8.2). Both operands are signed: levels of 4 bits are as they are, levels of 8 bits
// are read 128 lower.
#include "isa/architecture.h"
#if defined(PARD_AARCH64)
#define PARD_TARGET "arch=armv8.2-a+dotprod"
#include <arm_neon.h>
#include <string.h>

#include "isa/cpu.h"
#include "isa/isa.h"
#include "isa/target_begin.h"
#include "isa/silu.h"
#include "matmul/vector_tile.h"
#include "isa/neon.h"
#include "attention/vector_attention.h"

namespace pard {
namespace {

struct Dot {
  static constexpr int LOWEST_LEVEL = -128;

  static uint8x16_t byte_levels(uint8x16_t bytes) { return veorq_u8(bytes, vdupq_n_u8(128)); }

  template <int LANE>
  static int32x4_t dot(int32x4_t sum, uint8x16_t levels, int8x16_t groups) {
    return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(levels), groups, LANE);
  }
};

struct NeonDotprod : Neon {
  template <int BITS, size_t R>
  using Sums = LaneSums<Dot, BITS, R>;
};

}  // namespace

const Isa NEON_DOTPROD = {"neon-dotprod", NeonDotprod::HIGHEST_TILE, cpu_has_dotprod,
                          quantize<NeonDotprod>, multiply<NeonDotprod>, gate<NeonDotprod>, attend<NeonDotprod>};

}  // namespace pard
#include "isa/target_end.h"
#endif
