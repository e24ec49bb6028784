#include "matmul/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace pard {
namespace {

constexpr size_t LEAST_BYTES = 32 << 10;    // weights that a worker takes at a time, about
constexpr size_t CACHED_BYTES = 256 << 10;  // weights that stay in a core's cache while tiles of rows pass, about
constexpr size_t PIECE = 4096;              // activations that a worker quantizes at a time, about
constexpr size_t ALONE = 16384;             // activations up to which sharing them takes longer than it saves
constexpr unsigned SPINS_BEFORE_YIELD = 4096;

// Quantized rows, for one strip; kept from call to call by the thread that calls.
struct Scratch {
  std::vector<int8_t> levels;
  std::vector<float> scales, sums;
  std::vector<int32_t> offsets;

  void reserve(size_t rows, const Layout& layout) {
    grow(levels, rows * layout.inputs);
    grow(scales, rows * layout.blocks());
    grow(offsets, rows * layout.blocks());
    if (layout.format.minimums) grow(sums, rows * layout.blocks());
  }

 private:
  template <class T>
  static void grow(std::vector<T>& array, size_t size) {
    if (array.size() < size) array.resize(size);
  }
};

// One strip of rows. Workers first share the quantization, wait for one another, then share the weights: in units of
// one panel, or of two where a gate's panel and an up panel make one panel of results.
// There is no deadlock: a worker waits only for pieces that a running worker has taken.
class Strip {
 public:
  Strip(const Isa& isa, const Weights& weights, const float* x, size_t rows, float* out, Scratch& scratch)
      : isa_(isa), weights_(weights), x_(x), out_(out), scratch_(scratch), tiling_(rows, isa.highest_tile) {
    const Layout& layout = weights.layout;
    unit_ = weights.gated ? 2 : 1;
    units_ = layout.panels() / unit_;
    outputs_ = layout.outputs / unit_;
    least_ = at_least_one(LEAST_BYTES / (unit_ * layout.panel_bytes()));
    cached_ = tiling_.tiles == 1 ? units_ : at_least_one(CACHED_BYTES / (unit_ * layout.panel_bytes()));
    piece_blocks_ = at_least_one(PIECE / (layout.format.block * tiling_.height(0)));
    pieces_of_tile_ = (layout.blocks() + piece_blocks_ - 1) / piece_blocks_;
    pieces_ = tiling_.tiles * pieces_of_tile_;
  }

  // Tasks to offer to the pool. Each works until no work is left, so more tasks than threads would only cost time.
  size_t workers() const { return std::min(std::max(units_ / least_ + 1, pieces_), processors()); }

  // Before the work. Few activations are quantized here, so that no worker waits for another.
  void begin() {
    if (tiling_.rows * weights_.layout.inputs > ALONE) return;
    while (next_piece_ < pieces_) quantize(next_piece_++);
    done_ = pieces_;
  }

  static void work(void* self, size_t) { static_cast<Strip*>(self)->work(); }

 private:
  static size_t at_least_one(size_t count) { return std::max<size_t>(count, 1); }

  void work() {
    size_t i;
    while ((i = next_piece_.fetch_add(1, std::memory_order_relaxed)) < pieces_) {
      quantize(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    for (unsigned spins = 0; done_.load(std::memory_order_acquire) < pieces_; ++spins)
      if (spins >= SPINS_BEFORE_YIELD) std::this_thread::yield();
    for (size_t first, count; (count = take(first)) > 0;)
      for (const size_t end = first + count; first < end; first += cached_) multiply(first, std::min(first + cached_, end));
  }

  // The next units that no worker has taken: many at first, as a long stream of weights is fastest, then fewer, so that
  // all workers end together.
  size_t take(size_t& first) {
    first = next_unit_.load(std::memory_order_relaxed);
    while (first < units_) {
      const size_t left = units_ - first, count = std::min(std::max(left / (2 * processors()), least_), left);
      if (next_unit_.compare_exchange_weak(first, first + count, std::memory_order_relaxed)) return count;
    }
    return 0;
  }

  Activations tile_rows(size_t tile) const {
    const size_t first = tiling_.first(tile), blocks = weights_.layout.blocks();
    return {scratch_.levels.data() + first * weights_.layout.inputs, scratch_.scales.data() + first * blocks,
            scratch_.offsets.data() + first * blocks,
            weights_.layout.format.minimums ? scratch_.sums.data() + first * blocks : nullptr};
  }

  // A piece is a run of blocks of all rows of a tile: two workers that took rows would write to the same cache lines.
  void quantize(size_t piece) {
    const Layout& layout = weights_.layout;
    const size_t tile = piece / pieces_of_tile_, block = layout.format.block, height = tiling_.height(tile);
    const size_t first = piece % pieces_of_tile_ * piece_blocks_;
    const size_t blocks = std::min(piece_blocks_, layout.blocks() - first);
    Activations target = tile_rows(tile);
    target.levels += first * block * height;
    target.scales += first * height;
    target.offsets += first * height;
    if (target.sums) target.sums += first * height;
    const float* source = x_ + tiling_.first(tile) * layout.inputs + first * block;
    const int32_t factor = layout.format.minimums ? 0 : weights_.zeros.empty() ? layout.default_zero() : 1;
    for (size_t row = 0; row < height; ++row, source += layout.inputs)
      isa_.quantize({source, blocks, block, row, height, factor, target});
  }

  void multiply(size_t first, size_t end) {
    const size_t whole = std::min(end, outputs_ / PANEL);
    for (size_t tile = 0; tile < tiling_.tiles; ++tile) {
      float* out = out_ + tiling_.first(tile) * outputs_ + first * PANEL;
      if (weights_.gated)
        for (size_t unit = first; unit < end; ++unit, out += PANEL) multiply_gated(tile, unit, out);
      else if (first < whole)
        multiply(tile, first, whole - first, out, outputs_);
      if (whole < end) multiply_last(tile);
    }
  }

  void multiply(size_t tile, size_t panel, size_t panels, float* out, size_t stride) {
    const Layout& layout = weights_.layout;
    const uint8_t* zeros = weights_.zeros.empty() ? nullptr : weights_.zeros.data() + panel * layout.blocks() * PANEL;
    const float* bias = weights_.bias.empty() ? nullptr : weights_.bias.data() + panel * PANEL;
    isa_.multiply({layout.format, layout.blocks(), tiling_.height(tile),
                   weights_.panels->data() + panel * layout.panel_bytes(), layout.panel_bytes(), zeros, panels, bias,
                   tile_rows(tile), out, stride});
  }

  void multiply_gated(size_t tile, size_t unit, float* out) {
    float sums[HIGHEST_TILE * 2 * PANEL];
    multiply(tile, 2 * unit, 2, sums, 2 * PANEL);
    isa_.gate({sums, tiling_.height(tile), out, outputs_});
  }

  // The panel that has fewer outputs than PANEL.
  void multiply_last(size_t tile) {
    const size_t first = outputs_ / PANEL * PANEL;
    float sums[HIGHEST_TILE * PANEL];
    multiply(tile, outputs_ / PANEL, 1, sums, PANEL);
    for (size_t row = 0; row < tiling_.height(tile); ++row)
      std::memcpy(out_ + (tiling_.first(tile) + row) * outputs_ + first, sums + row * PANEL,
                  (outputs_ - first) * sizeof(float));
  }

  const Isa& isa_;
  const Weights& weights_;
  const float* x_;
  float* out_;
  Scratch& scratch_;
  Tiling tiling_;
  size_t unit_, units_, outputs_, least_, cached_, piece_blocks_, pieces_of_tile_, pieces_;
  std::atomic<size_t> next_piece_{0}, done_{0}, next_unit_{0};
};

}  // namespace

void matmul(const Isa& isa, const Weights& weights, const float* x, size_t rows, float* out, const Parallel& parallel) {
  static thread_local Scratch scratch;
  scratch.reserve(std::min(rows, MOST_ROWS), weights.layout);
  const size_t outputs = weights.outputs();
  for (size_t first = 0; first < rows; first += MOST_ROWS) {
    Strip strip(isa, weights, x + first * weights.layout.inputs, std::min(rows - first, MOST_ROWS),
                out + first * outputs, scratch);
    strip.begin();
    parallel.run(parallel.context, Strip::work, strip.workers(), &strip);
  }
}

}  // namespace pard
