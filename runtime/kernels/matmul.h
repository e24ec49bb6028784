// Rows times a packed matrix, on whatever threads the caller has.
#pragma once

#include "isa.h"
#include "weights.h"

namespace pard {

// Runs task(data, i) for i < count, on several threads or not, and returns when all are done.
struct Parallel {
  void* context;
  void (*run)(void* context, void (*task)(void* data, size_t i), size_t count, void* data);
};

// out[rows][N] = x[rows][K] times the matrix. A row's result does not depend on `rows` nor on the threads.
void matmul(const Isa& isa, const Weights& weights, const float* x, size_t rows, float* out, const Parallel& parallel);

}  // namespace pard
