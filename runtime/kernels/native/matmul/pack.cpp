#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>

#include "matmul/checked.h"
#include "matmul/weights.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pard {
namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20;

// The four nibbles of 16 bits, each in a byte of its own, in order.
uint32_t spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ff;
  return (nibbles | nibbles << 4) & 0x0f0f0f0f;
}

// Throws if one of these floats, or half-precision numbers, is an infinity or NaN: the bits of its exponent are all set.
template <class Word, Word EXPONENT>
void demand_finite(const void* numbers, size_t count, const char* name) {
  const auto* at = static_cast<const uint8_t*>(numbers);
  bool finite = true;
  for (size_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, at + i * sizeof word, sizeof word);
    finite &= (word & EXPONENT) != EXPONENT;
  }
  demand(finite, "MatMulNBits: ", name, " are not all finite");
}

// Packs rows of standard levels into the lines of one panel.
struct PanelPacker {
  const Layout& layout;
  std::vector<uint8_t> levels, zeros, scales;
  std::vector<uint16_t> minimums;

  explicit PanelPacker(const Layout& layout_)
      : layout(layout_),
        levels(PANEL * layout_.row_bytes()),
        zeros(PANEL * layout_.zero_row_bytes()),
        scales(PANEL * layout_.blocks() * layout_.scale_bytes()),
        minimums(layout_.format.minimums ? PANEL * layout_.blocks() : 0) {}

  // Outputs past the last are zeros of scale 0 and minimum 0.
  void read(const Read& from, size_t panel) {
    const size_t first = panel * PANEL, left = layout.outputs - first, rows = left < PANEL ? left : PANEL;
    if (rows < PANEL) {
      std::fill(levels.begin(), levels.end(), uint8_t{0});
      std::fill(scales.begin(), scales.end(), uint8_t{0});
      std::fill(minimums.begin(), minimums.end(), uint16_t{0});
      std::fill(zeros.begin(), zeros.end(), uint8_t{0});
    }
    const size_t row = layout.row_bytes(), zero = layout.zero_row_bytes();
    const size_t scale = layout.blocks() * layout.scale_bytes();
    from(Part::levels, first * row, rows * row, levels.data());
    from(Part::scales, first * scale, rows * scale, scales.data());
    if (layout.format.zero_points) from(Part::zero_points, first * zero, rows * zero, zeros.data());
    if (layout.format.minimums) from(Part::minimums, first * scale, rows * scale, minimums.data());
    const size_t count = rows * layout.blocks();
    if (layout.format.minimums) {
      demand_finite<uint16_t, 0x7c00>(scales.data(), count, "scales");
      demand_finite<uint16_t, 0x7c00>(minimums.data(), count, "minimums");
    } else {
      demand_finite<uint32_t, 0x7f800000>(scales.data(), count, "scales");
    }
  }

  void write(uint8_t* panel) const {
    const size_t words = layout.lines(), four_bits = layout.format.bits == 4;
    for (size_t b = 0; b < layout.blocks(); ++b) {
      for (size_t o = 0; o < PANEL; ++o) {
        const uint8_t* source = levels.data() + o * layout.row_bytes() + b * words * GROUP;
        for (size_t l = 0; l < words; ++l) {
          uint32_t word;
          std::memcpy(&word, source + l * GROUP, sizeof word);
          if (four_bits) word = spread(word & 0xffff) | spread(word >> 16) << 4;
          std::memcpy(panel + l * LINE + o * GROUP, &word, sizeof word);
        }
        uint8_t* const ends = panel + words * LINE;
        const size_t at = o * layout.blocks() + b, size = layout.scale_bytes();
        std::memcpy(ends + o * size, &scales[at * size], size);
        if (layout.format.minimums) std::memcpy(ends + (PANEL + o) * size, &minimums[at], size);
      }
      panel += layout.block_bytes();
    }
  }

  void write_zeros(uint8_t* out) const {
    for (size_t b = 0; b < layout.blocks(); ++b)
      for (size_t o = 0; o < PANEL; ++o) {
        const uint8_t* row = zeros.data() + o * layout.zero_row_bytes();
        *out++ = layout.format.bits == 8 ? row[b] : row[b / 2] >> (b % 2 * 4) & 15;
      }
  }
};

// Runs work(i) for each i < count on up to `threads` threads; throws the first exception of any.
void parallel(size_t count, size_t threads, const std::function<void(std::atomic<size_t>&)>& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto run = [&] {
    try {
      work(next);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (size_t i = 1; i < threads && i < count; ++i) helpers.emplace_back(run);
  } catch (const std::exception&) {  // no more threads, or no memory for them: fewer do it
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

// Alignment to huge pages costs address space only.
Buffer::Buffer(size_t bytes) : alignment_(bytes < HUGE_PAGE ? LINE : HUGE_PAGE) {
  data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(alignment_)));
#if defined(__linux__)
  // Whole huge pages only, so that the last one does not round the memory up.
  if (bytes >= HUGE_PAGE) madvise(data_, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t(alignment_)); }

void Weights::set_bias(const float* values) {
  bias.assign(layout.panels() * PANEL, 0.0f);
  std::copy(values, values + layout.outputs, bias.begin());
}

void check(const Layout& layout) {
  const Format& format = layout.format;
  const size_t block = format.block, outputs = layout.outputs, inputs = layout.inputs;
  demand(format.bits == 4 || format.bits == 8, "MatMulNBits: bits ", format.bits, ", not 4 or 8");
  demand(block == 32 || block == 64 || block == 128, "MatMulNBits: block_size ", block, ", not 32, 64 or 128");
  demand(!format.minimums || (format.bits == 4 && !format.zero_points),
         "MatMulNBits: minimums are for 4 bits without zero points");
  demand(outputs > 0, "MatMulNBits: N is 0");
  demand(inputs > 0 && inputs % block == 0, "MatMulNBits: K ", inputs, " is no multiple of block_size ", block);
  // Every other size is a factor of one of these, or smaller.
  const bool fits = outputs <= MOST_BYTES - PANEL &&
                    checked_product({layout.panels(), layout.blocks(), layout.block_bytes()}) &&
                    checked_product({inputs, MOST_ROWS, sizeof(float)});
  demand(fits, "MatMulNBits: N ", outputs, " and K ", inputs, " ask for more memory than can be addressed");
}

Weights pack(const Layout& layout, const Source& source, size_t threads) {
  check(layout);
  Weights out;
  out.layout = layout;
  out.panels = std::make_unique<Buffer>(layout.bytes());
  const size_t zero_bytes = layout.blocks() * PANEL;
  if (layout.format.zero_points) out.zeros.resize(layout.panels() * zero_bytes);
  parallel(layout.panels(), threads, [&](std::atomic<size_t>& next) {
    PanelPacker packer(layout);
    const Read read = source();
    for (size_t panel; (panel = next++) < layout.panels();) {
      packer.read(read, panel);
      packer.write(out.panels->data() + panel * layout.panel_bytes());
      if (layout.format.zero_points) packer.write_zeros(out.zeros.data() + panel * zero_bytes);
    }
  });
  return out;
}

Weights pack_gated(const Layout& layout, const Source& gate, const Source& up, size_t threads) {
  check(layout);
  demand(layout.outputs % PANEL == 0, "GatedMatMulNBits: N ", layout.outputs, " is no multiple of 16");
  Layout both = layout;
  both.outputs *= 2;  // below the address space, as `check` says; `pack` checks the double again
  // `pack` reads a panel at a time, so an offset tells which panel it is.
  const Source source = [&]() -> Read {
    return [gate = gate(), up = up()](Part part, size_t offset, size_t count, void* target) {
      const size_t panel = offset / count;
      (panel % 2 ? up : gate)(part, panel / 2 * count, count, target);
    };
  };
  Weights out = pack(both, source, threads);
  out.gated = true;
  return out;
}

}  // namespace pard
