// Random matrices and attention steps through every kernel of this processor, against the portable one: to be run
// under sanitizers. Arguments: number of each, seed. Prints a digest of packed weights and results, which is the same on
// every architecture.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "isa/dispatch.h"
#include "matmul/matmul.h"
#include "ort/run_threads.h"

namespace {

using namespace pard;

const char* const NAMES[] = {"avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "reference"};

std::mt19937 generator;

size_t below(size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(generator); }

// Exactly as large as it must be, so that AddressSanitizer sees one step beyond.
template <class T>
std::unique_ptr<T[]> random_array(size_t count) {
  auto out = std::make_unique<T[]>(count);
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<int>(below(256)) - 128);
  return out;
}

// Of any bits but those of infinities and NaN.
std::unique_ptr<uint16_t[]> random_halves(size_t count) {
  auto out = std::make_unique<uint16_t[]>(count);
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(below(0x7c00) | below(2) << 15);
  return out;
}

void special_values(float* x, size_t count) {
  const float values[] = {0.0f, -0.0f, 1e-40f, 3e38f, HUGE_VALF, -HUGE_VALF, NAN};
  for (size_t i = below(4) ? 0 : 3; i > 0; --i) x[below(count)] = values[below(7)];
}

// Bit for bit, where they are numbers.
bool equal(const float* a, const float* b, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (std::memcmp(a + i, b + i, sizeof(float)) && !(a[i] != a[i] && b[i] != b[i])) {
      std::printf("%a instead of %a; ", a[i], b[i]);
      return false;
    }
  return true;
}

uint64_t digest = 14695981039346656037u;  // FNV-1a

void add_to_digest(const void* data, size_t count) {
  for (size_t i = 0; i < count; ++i) digest = (digest ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
}

// Any NaN counts as the same one: its sign and payload are the processor's.
void add_to_digest(const float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const float value = x[i] == x[i] ? x[i] : 0.5f;
    add_to_digest(static_cast<const void*>(&value), sizeof value);
  }
}

bool one_matrix() {
  Layout layout;
  layout.format.bits = below(2) ? 4 : 8;
  layout.format.block = size_t{32} << below(3);
  layout.format.minimums = layout.format.bits == 4 && below(3) == 0;
  layout.format.zero_points = !layout.format.minimums && below(2);
  layout.outputs = below(2) ? PANEL * (1 + below(9)) : 1 + below(150);
  layout.inputs = layout.format.block * (1 + below(6));
  const auto levels = random_array<uint8_t>(layout.outputs * layout.row_bytes());
  const auto zeros = random_array<uint8_t>(layout.outputs * layout.zero_row_bytes());
  const auto scales = random_array<float>(layout.outputs * layout.blocks());
  const auto halves = random_halves(layout.outputs * layout.blocks()), minimums = random_halves(layout.outputs * layout.blocks());
  const auto bias = random_array<float>(layout.outputs);
  const void* const stored_scales = layout.format.minimums ? static_cast<const void*>(halves.get()) : scales.get();
  const void* const parts[] = {levels.get(), stored_scales, zeros.get(), minimums.get()};
  const Read read = [&](Part part, size_t offset, size_t count, void* target) {
    std::memcpy(target, static_cast<const uint8_t*>(parts[static_cast<size_t>(part)]) + offset, count);
  };
  const Source source = [&] { return read; };
  const bool gated = layout.outputs % PANEL == 0 && below(2);
  Weights weights = gated ? pack_gated(layout, source, source, 1 + below(8)) : pack(layout, source, 1 + below(8));
  if (!gated && below(2)) weights.set_bias(bias.get());

  const size_t rows = 1 + below(below(8) ? 20 : 300);
  const auto x = random_array<float>(rows * layout.inputs);
  special_values(x.get(), rows * layout.inputs);
  const size_t size = rows * layout.outputs;
  const auto expected = std::make_unique<float[]>(size), out = std::make_unique<float[]>(size);
  size_t threads = 1;
  matmul(*find_isa("reference"), weights, x.get(), rows, expected.get(), {&threads, run_threads});
  add_to_digest(weights.panels->data(), weights.layout.bytes());
  add_to_digest(expected.get(), size);
  threads = 1 + below(8);  // of all kernels: what is drawn must not depend on how many there are
  for (const char* name : NAMES) {
    const Isa* isa = find_isa(name);
    if (!isa) continue;
    matmul(*isa, weights, x.get(), rows, out.get(), {&threads, run_threads});
    if (equal(out.get(), expected.get(), size)) continue;
    std::printf("%s: %zu x %zu x %zu, %d bits, block %zu\n", name, rows, layout.inputs, layout.outputs,
                layout.format.bits, layout.format.block);
    return false;
  }
  return true;
}

// Results, and what the caches hold afterwards.
struct Attended {
  size_t size, cache;
  std::unique_ptr<float[]> out, keys, values;

  Attended(size_t size_, size_t cache_, const float* keys_, const float* values_)
      : size(size_), cache(cache_), out(new float[size]), keys(new float[cache]), values(new float[cache]) {
    std::copy(keys_, keys_ + cache, keys.get());
    std::copy(values_, values_ + cache, values.get());
  }

  void run(const Isa& isa, AttentionStep step, size_t threads) {
    step.key_cache = keys.get();
    step.value_cache = values.get();
    step.out = out.get();
    attention(isa, step, {&threads, run_threads});
  }

  bool operator==(const Attended& other) const {
    return equal(out.get(), other.out.get(), size) && equal(keys.get(), other.keys.get(), cache) &&
           equal(values.get(), other.values.get(), cache);
  }
};

bool one_attention() {
  AttentionStep step{};
  step.kv_heads = 1 + below(4);
  step.heads = step.kv_heads * (1 + below(8));
  step.dim = PANEL * (1 + below(8));
  step.half = below(4) ? step.dim / 2 : below(step.dim / 2 + 1);
  step.rows = 1 + below(below(8) ? 20 : 80);
  step.past = below(200);
  step.capacity = step.past + step.rows + below(3);
  step.scale = 0.001f;
  step.window = below(2) ? 0 : 1 + below(below(2) ? 8 : 150);
  step.query_stride = step.heads * step.dim;
  step.kv_stride = step.kv_heads * step.dim;
  const size_t cache = step.kv_heads * step.capacity * step.dim, size = step.rows * step.query_stride;
  const auto queries = random_array<float>(size), keys = random_array<float>(step.rows * step.kv_stride),
             values = random_array<float>(step.rows * step.kv_stride), key_cache = random_array<float>(cache),
             value_cache = random_array<float>(cache);
  const auto tables = random_array<float>(2 * step.capacity * step.half);
  special_values(queries.get(), size);
  special_values(key_cache.get(), cache);
  step.queries = queries.get();
  step.keys = keys.get();
  step.values = values.get();
  step.cosines = tables.get();
  step.sines = tables.get() + step.capacity * step.half;

  Attended expected(size, cache, key_cache.get(), value_cache.get());
  expected.run(*find_isa("reference"), step, 1);
  add_to_digest(expected.out.get(), size);
  add_to_digest(expected.keys.get(), cache);
  const size_t threads = 1 + below(8);
  for (const char* name : NAMES) {
    const Isa* isa = find_isa(name);
    if (!isa) continue;
    Attended found(size, cache, key_cache.get(), value_cache.get());
    found.run(*isa, step, threads);
    if (found == expected) continue;
    std::printf("%s: %zu rows behind %zu, %zu heads on %zu of %zu\n", name, step.rows, step.past, step.heads,
                step.kv_heads, step.dim);
    return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 200;
  generator.seed(count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 1);
  for (int i = 0; i < rounds; ++i)
    if (!one_matrix() || !one_attention()) return 1;
  std::printf("%d rounds, best %s, digest %016" PRIx64 "\n", rounds, selected_isa().name, digest);
}
