// Multiplies rows by a packed matrix, on the caller's threads.
#pragma once

#include "isa/isa.h"
#include "ort/parallel.h"
#include "matmul/weights.h"

namespace pard {

// out[rows][N] = x[rows][K] times the matrix. A row's result does not depend on `rows` nor on the threads.
void matmul(const Isa& isa, const Weights& weights, const float* x, size_t rows, float* out, const Parallel& parallel);

}  // namespace pard
