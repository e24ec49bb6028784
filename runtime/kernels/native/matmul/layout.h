// The layout of weights and quantized activations in memory. All instruction sets read the same layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pard {

constexpr size_t PANEL = 16;             // outputs side by side: the floats of one 512-bit register
constexpr size_t LINE = 64;              // bytes of a cache line: PANEL outputs x 4 bytes
constexpr size_t GROUP = 4;              // activations in one 32-bit dot product
constexpr size_t HIGHEST_TILE = 12;      // rows of a tile, of any instruction set
constexpr size_t MOST_ROWS = 256;        // rows quantized at a time; bounds the scratch memory of a prefill
constexpr float LARGEST_LEVEL = 127.0f;  // activations are -127..127, so that negation never overflows
constexpr size_t KEYS = 64;              // of a block of attention

constexpr size_t whole_panels(size_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

// A storage format of MatMulNBits. bits 4 or 8; block 32, 64 or 128 inputs share a scale.
// minimums: weight = scale * level + minimum, both float16, at 4 bits and without zero points.
struct Format {
  int bits = 4;
  size_t block = 128;
  bool zero_points = false;
  bool minimums = false;
};

// Packed weights, [panel][block]: `lines()` lines of levels, then one line of PANEL float scales, or with minimums of
// PANEL float16 scales and PANEL float16 minimums.
// A line at 4 bits holds 8 inputs k..k+7 of 16 outputs: byte 4*output+j has input k+j in its low and k+4+j in
// its high nibble, so one AND and one shift give two operands of four inputs each. At 8 bits it holds 4 inputs.
struct Layout {
  Format format;
  size_t outputs = 0;  // N
  size_t inputs = 0;   // K, a multiple of the block

  size_t blocks() const { return inputs / format.block; }
  size_t panels() const { return (outputs + PANEL - 1) / PANEL; }
  size_t lines() const { return format.block * static_cast<size_t>(format.bits) / 32; }
  size_t block_bytes() const { return (lines() + 1) * LINE; }
  size_t panel_bytes() const { return blocks() * block_bytes(); }
  size_t bytes() const { return panels() * panel_bytes(); }
  // Of one output in the standard layout.
  size_t row_bytes() const { return inputs * static_cast<size_t>(format.bits) / 8; }
  size_t zero_row_bytes() const { return (blocks() * static_cast<size_t>(format.bits) + 7) / 8; }
  size_t scale_bytes() const { return format.minimums ? sizeof(uint16_t) : sizeof(float); }
  int default_zero() const { return 1 << (format.bits - 1); }
};

// Rows in tiles of nearly equal height, none above `highest`.
struct Tiling {
  size_t rows = 0;
  size_t tiles = 0;

  Tiling(size_t rows_, size_t highest) : rows(rows_), tiles((rows_ + highest - 1) / highest) {}
  size_t first(size_t tile) const { return tile * (rows / tiles) + (tile < rows % tiles ? tile : rows % tiles); }
  size_t height(size_t tile) const { return rows / tiles + (tile < rows % tiles ? 1 : 0); }
};

// Activations of one tile of r rows: levels [K/4][r][4], scales and offsets [block][r].
// offset: minus the block's sum of levels times what is zero among weight levels (1 where weights have zero points of
// their own), the start value of a dot product of unsigned weight levels. sum: of the block's numbers, for minimums.
struct Activations {
  int8_t* levels = nullptr;
  float* scales = nullptr;
  int32_t* offsets = nullptr;
  float* sums = nullptr;  // [block][r], or null where weights have no minimums
};

}  // namespace pard
