// Plain C functions for tests and for the Python package: they need no session.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "isa/dispatch.h"
#include "ort/export.h"
#include "matmul/matmul.h"
#include "ort/run_threads.h"

namespace {

using namespace pard;

// Null and `error` filled if `body` throws.
template <class F>
auto caught(char* error, size_t size, F&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception& failure) {
    if (size) {
      const size_t length = std::min(std::strlen(failure.what()), size - 1);
      std::memcpy(error, failure.what(), length);
      error[length] = '\0';
    }
    return {};
  }
}

}  // namespace

PARD_EXPORT const char* pard_isa() { return selected_isa().name; }

// Selects the instruction set of kernels that are created later (null: the best one). 0 if this processor lacks it.
PARD_EXPORT int pard_select_isa(const char* name) { return select_isa(name); }

// Packs standard tensors, in the order of Part; on failure returns null, with the message in `error`. Zero points or
// minimums may be null, and bias. up: the tensors of a second matrix, for a gated one, or null.
PARD_EXPORT Weights* pard_pack(int bits, size_t block, size_t outputs, size_t inputs, const void* const* tensors,
                               const void* const* up, const float* bias, size_t threads, char* error, size_t size) {
  return caught(error, size, [&] {
    const auto source = [](const void* const* parts) -> Source {
      return [=] {
        return [=](Part part, size_t offset, size_t count, void* target) {
          std::memcpy(target, static_cast<const uint8_t*>(parts[static_cast<size_t>(part)]) + offset, count);
        };
      };
    };
    const auto has = [&](Part part) { return tensors[static_cast<size_t>(part)] != nullptr; };
    const Layout layout{{bits, block, has(Part::zero_points), has(Part::minimums)}, outputs, inputs};
    auto out = std::make_unique<Weights>(up ? pack_gated(layout, source(tensors), source(up), threads)
                                            : pack(layout, source(tensors), threads));
    if (bias) out->set_bias(bias);
    return out.release();
  });
}

PARD_EXPORT size_t pard_packed_bytes(const Weights* weights) { return weights->bytes(); }

PARD_EXPORT void pard_free(Weights* weights) { delete weights; }

// out[rows][N] = x[rows][K] times the matrix, or silu of the gate times up; 0 if this processor does not have the instruction set.
PARD_EXPORT int pard_matmul(const char* isa_name, const Weights* weights, const float* x, size_t rows, float* out,
                            size_t threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return 0;
  matmul(*isa, *weights, x, rows, out, {&threads, run_threads});
  return 1;
}

// Writes the step's keys and values into the caches, then its rows' attention to step->out; 0 as above.
PARD_EXPORT int pard_attention(const char* isa_name, const AttentionStep* step, size_t threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return 0;
  attention(*isa, *step, {&threads, run_threads});
  return 1;
}
