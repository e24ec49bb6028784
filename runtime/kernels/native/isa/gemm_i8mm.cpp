// NEON with matrix products of int8 (i8mm, optional from Armv8.2 on): one instruction multiplies 8 inputs of two outputs
// by those of two rows. Weight levels are unsigned, so levels of 8 bits are as they are.
#include "isa/architecture.h"
#if defined(PARD_AARCH64)
#define PARD_TARGET "arch=armv8.2-a+dotprod+i8mm"
#include <arm_neon.h>
#include <string.h>

#include <type_traits>

#include "isa/cpu.h"
#include "isa/isa.h"
#include "isa/target_begin.h"
#include "isa/silu.h"
#include "matmul/vector_tile.h"
#include "isa/neon.h"
#include "attention/vector_attention.h"

namespace pard {
namespace {

struct MixedDot {
  static constexpr int LOWEST_LEVEL = 0;

  static uint8x16_t byte_levels(uint8x16_t bytes) { return bytes; }

  template <int LANE>
  static int32x4_t dot(int32x4_t sum, uint8x16_t levels, int8x16_t groups) {
    return vusdotq_laneq_s32(sum, levels, groups, LANE);
  }
};

// The sums of R rows, two by two, times one panel (see VectorSums). A register has [output, output + 1][row, row + 1].
// The last of an odd number of rows is its own neighbour.
template <int BITS, size_t R>
struct MatrixSums {
  static constexpr size_t PAIRS = (R + 1) / 2, V = PANEL / Neon::LANES;
  static constexpr size_t LINES = BITS == 4 ? 1 : 2;  // 8 inputs
  static constexpr int LOWEST_LEVEL = 0;

  // The sum of one row and four outputs, within its two registers.
  struct Sum {
    int32x4_t (&pair)[2];
    bool odd, last;

    // Rows start in order.
    void start(int32x4_t x) {
      const int32x4_t first = odd ? pair[0] : x;
      pair[0] = odd || last ? vzip1q_s32(first, x) : x;
      if (odd || last) pair[1] = vzip2q_s32(first, x);
    }
    void flush() {}
    int32x4_t total() const { return odd ? vuzp2q_s32(pair[0], pair[1]) : vuzp1q_s32(pair[0], pair[1]); }
  };
  struct Row {
    int32x4_t (&pairs)[V][2];
    size_t r;

    Sum operator[](size_t v) { return {pairs[v], r % 2 == 1, r == R - 1}; }
  };
  struct State {
    int32x4_t pairs[PAIRS][V][2];

    Row operator[](size_t r) { return {pairs[r / 2], r}; }
  };

  static void add(const uint8_t* weights, const int8_t* rows, State& sums) {
    Neon::prefetch(weights + PREFETCH);
    int8x16_t inputs[PAIRS];
    load(rows, rows + R * GROUP, inputs);
    for (size_t v = 0; v < V; ++v) {
      Neon::keep_loads();
      const uint8x16_t bytes = vld1q_u8(weights + v * 16);
      if constexpr (BITS == 4)
        multiply(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4), inputs, v, sums);
      else
        multiply(bytes, vld1q_u8(weights + LINE + v * 16), inputs, v, sums);
    }
    Neon::keep_loads();
  }

  // Two groups of each row, rows in pairs; nothing beyond the last row is read.
  static void load(const int8_t* first, const int8_t* second, int8x16_t (&inputs)[PAIRS]) {
    for (size_t i = 0; i < R / 4; ++i) {
      const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(first + i * 4 * GROUP));
      const int32x4_t b = vreinterpretq_s32_s8(vld1q_s8(second + i * 4 * GROUP));
      inputs[2 * i] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
      inputs[2 * i + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
    if constexpr (R % 4 >= 2) {
      const size_t at = R / 4 * 4 * GROUP;
      const int8x8_t none = vdup_n_s8(0);
      const int32x4_t a = vreinterpretq_s32_s8(vcombine_s8(vld1_s8(first + at), none));
      const int32x4_t b = vreinterpretq_s32_s8(vcombine_s8(vld1_s8(second + at), none));
      inputs[R / 4 * 2] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    }
    if constexpr (R % 2 == 1) {
      const size_t at = (R - 1) * GROUP;
      inputs[R / 2] = vreinterpretq_s8_s32(
          vzip1q_s32(vdupq_n_s32(load_group(first + at)), vdupq_n_s32(load_group(second + at))));
    }
  }

  // first, second: levels of four inputs each, of four outputs.
  static void multiply(uint8x16_t first, uint8x16_t second, const int8x16_t (&inputs)[PAIRS], size_t v, State& sums) {
    const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
    const uint8x16_t low = vreinterpretq_u8_u32(vzip1q_u32(a, b)), high = vreinterpretq_u8_u32(vzip2q_u32(a, b));
    for (size_t p = 0; p < PAIRS; ++p) {
      sums.pairs[p][v][0] = vusmmlaq_s32(sums.pairs[p][v][0], low, inputs[p]);
      sums.pairs[p][v][1] = vusmmlaq_s32(sums.pairs[p][v][1], high, inputs[p]);
    }
  }
};

struct NeonI8mm : Neon {
  static constexpr size_t HIGHEST_TILE = 4;  // 32 registers: 16 sums, 8 weights; 6 rows spill

  // A matrix product of one row does no more than a dot product.
  template <int BITS, size_t R>
  using Sums = std::conditional_t<R == 1, LaneSums<MixedDot, BITS, R>, MatrixSums<BITS, R>>;
};

}  // namespace

const Isa NEON_I8MM = {"neon-i8mm", NeonI8mm::HIGHEST_TILE, cpu_has_i8mm,
                       quantize<NeonI8mm>, multiply<NeonI8mm>, gate<NeonI8mm>, attend<NeonI8mm>};

}  // namespace pard
#include "isa/target_end.h"
#endif
