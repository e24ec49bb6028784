// What one instruction set contributes: a table of functions that the dispatcher picks from.
#pragma once

#include "layout.h"

namespace pard {

// A run of blocks of one row into its tile. sum_factor: see Activations::offsets.
struct QuantizeRow {
  const float* source;
  size_t blocks, block;
  size_t row, height;  // its place in the tile
  int32_t sum_factor;
  Activations target;  // the tile's, from the run's first block on
};

// A tile of rows times a run of panels.
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

struct Isa {
  const char* name;
  size_t highest_tile;
  bool (*supported)();
  void (*quantize)(const QuantizeRow&);
  void (*multiply)(const Tile&);
  void (*gate)(const Gating&);
};

extern const Isa REFERENCE, AVX2, AVX_VNNI, AVX512_VNNI;

}  // namespace pard
