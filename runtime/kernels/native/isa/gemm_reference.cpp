// The portable kernel, which any processor can run. The vector kernels are tested against it, bit for bit.
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/isa.h"
#include "isa/silu.h"
#include "matmul/half.h"
#include "attention/vector_attention.h"

namespace pard {
namespace {

constexpr float SMALLEST_PEAK = 0x1p-121f;  // below it 127 / peak overflows; such blocks are zeros

bool always() { return true; }

void quantize(const QuantizeRow& job) {
  for (size_t b = 0; b < job.blocks; ++b) {
    const float* source = job.source + b * job.block;
    float peak = 0;
    bool finite = true;
    for (size_t k = 0; k < job.block; ++k) {
      finite = finite && std::isfinite(source[k]);
      peak = std::fmax(peak, std::fabs(source[k]));
    }
    const bool regular = finite && peak >= SMALLEST_PEAK;
    const float inverse = regular ? LARGEST_LEVEL / peak : 0.0f;
    int32_t sum = 0;
    for (size_t k = 0; k < job.block; ++k) {
      const auto level = regular ? static_cast<int8_t>(std::nearbyint(source[k] * inverse)) : int8_t{0};
      sum += level;
      const size_t group = (b * job.block + k) / GROUP * job.height + job.row;
      job.target.levels[group * GROUP + k % GROUP] = level;
    }
    const size_t at = b * job.height + job.row;
    const float scale = regular ? peak / LARGEST_LEVEL : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    job.target.scales[at] = scale;
    if (job.target.sums) job.target.sums[at] = scale * static_cast<float>(sum);
    job.target.offsets[at] = -sum * job.sum_factor;
  }
}

// Weight level of input k of a block, for output o of the panel.
int32_t level(const uint8_t* lines, int bits, size_t k, size_t o) {
  if (bits == 8) return lines[k / GROUP * LINE + o * GROUP + k % GROUP];
  const uint8_t byte = lines[k / (2 * GROUP) * LINE + o * GROUP + k % GROUP];
  return k / GROUP % 2 ? byte >> 4 : byte & 15;
}

float half(const uint8_t* line, size_t index) {
  uint16_t bits;
  std::memcpy(&bits, line + index * sizeof bits, sizeof bits);
  return float_of_half(bits);
}

float output(const Tile& tile, size_t panel, size_t o, size_t row) {
  const size_t lines = tile.format.block * static_cast<size_t>(tile.format.bits) / 32;
  const uint8_t* weights = tile.weights + panel * tile.panel_bytes;
  float out = 0;
  for (size_t b = 0; b < tile.blocks; ++b) {
    const size_t at = b * tile.height + row;
    int32_t sum = tile.rows.offsets[at];
    if (tile.zeros) sum *= tile.zeros[(panel * tile.blocks + b) * PANEL + o];
    for (size_t k = 0; k < tile.format.block; ++k) {
      const size_t group = (b * tile.format.block + k) / GROUP * tile.height + row;
      sum += level(weights, tile.format.bits, k, o) * tile.rows.levels[group * GROUP + k % GROUP];
    }
    const uint8_t* ends = weights + lines * LINE;
    float scale;
    if (tile.format.minimums)
      scale = half(ends, o);
    else
      std::memcpy(&scale, ends + o * sizeof scale, sizeof scale);
    out = std::fma(static_cast<float>(sum) * scale, tile.rows.scales[at], out);
    if (tile.format.minimums) out = std::fma(half(ends, PANEL + o), tile.rows.sums[at], out);
    weights += (lines + 1) * LINE;
  }
  return out + (tile.bias ? tile.bias[panel * PANEL + o] : 0.0f);
}

// One number as a vector of one, for silu.h and vector_attention.h.
struct Scalar {
  using Int = int32_t;
  using Float = float;
  static constexpr size_t LANES = 1;
  static constexpr size_t ROWS = 1, WIDEST = PANEL;

  static void prefetch_far(const uint8_t*) {}
  static Float load(const float* at) { return *at; }
  static void store(float* at, Float x) { *at = x; }
  static Float broadcast(float x) { return x; }
  static Float factor(float x) { return x; }
  static Float add(Float a, Float b) { return a + b; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Float divide(Float a, Float b) { return a / b; }
  static Float fma(Float a, Float b, Float c) { return std::fma(a, b, c); }
  static Float min(Float a, Float b) { return a < b ? a : b; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float largest_float(Float x) { return x; }
  static Float zip_low(Float a, Float) { return a; }
  static Float zip_high(Float, Float b) { return b; }
  static Int round(Float x) { return x == x ? static_cast<Int>(std::nearbyint(x)) : 0; }
  static Float to_float(Int x) { return static_cast<Float>(x); }
  static Float power_of_two(Int n) { return n < -126 ? 0.0f : std::ldexp(1.0f, n); }
};

void multiply(const Tile& tile) {
  for (size_t panel = 0; panel < tile.panels; ++panel)
    for (size_t row = 0; row < tile.height; ++row)
      for (size_t o = 0; o < PANEL; ++o)
        tile.sums[row * tile.stride + panel * PANEL + o] = output(tile, panel, o, row);
}

}  // namespace

const Isa REFERENCE = {"reference", 8, always, quantize, multiply, gate<Scalar>, attend<Scalar>};

}  // namespace pard
