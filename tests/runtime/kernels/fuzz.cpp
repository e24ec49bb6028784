// Random matrices through every kernel of this processor, against the portable one: to be run under sanitizers.
// Arguments: number of matrices, seed. test_sanitizers.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "dispatch.h"
#include "matmul.h"

namespace {

using namespace pard;

const char* const NAMES[] = {"avx512-vnni", "avx-vnni", "avx2", "reference"};

std::mt19937 generator;

size_t below(size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(generator); }

// Exactly as large as it must be, so that AddressSanitizer sees one step beyond.
template <class T>
std::unique_ptr<T[]> random_array(size_t count) {
  auto out = std::make_unique<T[]>(count);
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<int>(below(256)) - 128);
  return out;
}

void run_threads(void* context, void (*task)(void*, size_t), size_t count, void* data) {
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < *static_cast<size_t*>(context) && i < count; ++i) helpers.emplace_back(task, data, i);
  if (count) task(data, 0);
  for (std::thread& helper : helpers) helper.join();
}

void special_values(float* x, size_t count) {
  const float values[] = {0.0f, -0.0f, 1e-40f, 3e38f, HUGE_VALF, -HUGE_VALF, NAN};
  for (size_t i = below(4) ? 0 : 3; i > 0; --i) x[below(count)] = values[below(7)];
}

bool one_matrix() {
  Layout layout;
  layout.format.bits = below(2) ? 4 : 8;
  layout.format.block = size_t{32} << below(3);
  layout.format.zero_points = below(2);
  layout.outputs = below(2) ? PANEL * (1 + below(9)) : 1 + below(150);
  layout.inputs = layout.format.block * (1 + below(6));
  const auto levels = random_array<uint8_t>(layout.outputs * layout.row_bytes());
  const auto zeros = random_array<uint8_t>(layout.outputs * layout.zero_row_bytes());
  const auto scales = random_array<float>(layout.outputs * layout.blocks());
  const auto bias = random_array<float>(layout.outputs);
  const void* const parts[] = {levels.get(), scales.get(), zeros.get()};
  const Read read = [&](Part part, size_t offset, size_t count, void* target) {
    std::memcpy(target, static_cast<const uint8_t*>(parts[static_cast<size_t>(part)]) + offset, count);
  };
  const bool gated = layout.outputs % PANEL == 0 && below(2);
  Weights weights = gated ? pack_gated(layout, read, read, 1 + below(8)) : pack(layout, read, 1 + below(8));
  if (!gated && below(2)) weights.set_bias(bias.get());

  const size_t rows = 1 + below(below(8) ? 20 : 300);
  const auto x = random_array<float>(rows * layout.inputs);
  special_values(x.get(), rows * layout.inputs);
  const size_t size = rows * layout.outputs;
  const auto expected = std::make_unique<float[]>(size), out = std::make_unique<float[]>(size);
  size_t threads = 1;
  matmul(*find_isa("reference"), weights, x.get(), rows, expected.get(), {&threads, run_threads});
  for (const char* name : NAMES) {
    const Isa* isa = find_isa(name);
    if (!isa) continue;
    threads = 1 + below(8);
    matmul(*isa, weights, x.get(), rows, out.get(), {&threads, run_threads});
    for (size_t i = 0; i < size; ++i)
      if (std::memcmp(&out[i], &expected[i], sizeof(float)) && !(out[i] != out[i] && expected[i] != expected[i])) {
        std::printf("%s: %zu x %zu x %zu, %d bits, block %zu: %a instead of %a\n", name, rows, layout.inputs,
                    layout.outputs, layout.format.bits, layout.format.block, out[i], expected[i]);
        return false;
      }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int matrices = count > 1 ? std::atoi(arguments[1]) : 200;
  generator.seed(count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 1);
  for (int i = 0; i < matrices; ++i)
    if (!one_matrix()) return 1;
  std::printf("%d matrices\n", matrices);
}
