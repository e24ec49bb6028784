// The kernels of one instruction set: a table of functions, of which the dispatcher chooses one table.
#pragma once

#include <limits>

#include "matmul/layout.h"

namespace pard {

// Quantizes consecutive blocks of one row into its tile. sum_factor: see Activations::offsets.
struct QuantizeRow {
  const float* source;
  size_t blocks, block;
  size_t row, height;  // its place in the tile
  int32_t sum_factor;
  Activations target;  // the tile's, from the run's first block on
};

// Multiplies a tile of rows by consecutive panels.
struct Tile {
  Format format;
  size_t blocks;
  size_t height;           // rows
  const uint8_t* weights;  // first panel
  size_t panel_bytes;
  const uint8_t* zeros;  // [panel][block][PANEL] of the first panel, or null
  size_t panels;
  const float* bias;  // [panels * PANEL], or null
  Activations rows;
  float* sums;  // out, [row][stride]: PANEL floats for each panel
  size_t stride;
};

// out[row][PANEL] = silu(gate) * up, for rows of a gate panel beside an up panel.
struct Gating {
  const float* pairs;  // [height][2 * PANEL]
  size_t height;
  float* out;  // [height][stride]
  size_t stride;
};

// What a worker needs to attend with a unit of rows; every part begins at a multiple of 64 bytes.
struct AttendScratch {
  float* queries;  // [count][dim], rotated and scaled
  float* keys;     // [dim][KEYS]: a block of keys, transposed
  float* scores;   // [count][KEYS]
  float* values;   // [count][dim]: sums of weighted values
  float* sums;     // [count][PANEL]: of weights
  float* highest;  // [count]: score
};

// A unit of queries of one KV head. Query r is a head of token (first + r) / group, and sees the keys of `past` tokens,
// those of the step up to its own, and no others; of these the last `window` ones, if that is not 0.
struct QueryRows {
  const float *keys, *values;  // [rows][dim]
  size_t dim;                  // a multiple of PANEL
  size_t first, count, group;
  size_t past, window;
  float* out;  // [token][stride], of query head 0 of the group
  size_t stride;
  AttendScratch scratch;
};

struct Isa {
  const char* name;
  size_t highest_tile;
  bool (*supported)();
  void (*quantize)(const QuantizeRow&);
  void (*multiply)(const Tile&);
  void (*gate)(const Gating&);
  void (*attend)(const QueryRows&);
};

extern const Isa REFERENCE;
extern const Isa AVX2, AVX_VNNI, AVX512_VNNI;     // on x86-64
extern const Isa NEON_DOTPROD, NEON_I8MM;  // on Arm

}  // namespace pard
