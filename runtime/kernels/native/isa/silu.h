// silu(x) = x / (1 + exp(-x)) over the primitives S of an instruction set; every S rounds alike.
#pragma once

#include "isa/isa.h"

namespace pard {
namespace {

// exp of x in [-LIMIT, LIMIT]: 2^n * exp(r), with r in [-ln 2 / 2, ln 2 / 2] by its Taylor polynomial of degree 7,
// whose error is below the rounding of a float. ln 2 in two parts, so that n * the first is exact.
constexpr float EXP_LIMIT = 87.0f;  // beyond it 2^n is no ordinary float
constexpr float LOG2_E = 1.44269504f;
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
constexpr float TAYLOR[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};

template <class S>
typename S::Float exponential(typename S::Float x) {
  const typename S::Int n = S::round(S::multiply(x, S::broadcast(LOG2_E)));
  const typename S::Float whole = S::to_float(n);
  typename S::Float r = S::fma(whole, S::broadcast(-LN2_HIGH), x);
  r = S::fma(whole, S::broadcast(-LN2_LOW), r);
  typename S::Float sum = S::broadcast(TAYLOR[0]);
  for (int i = 1; i < 8; ++i) sum = S::fma(sum, r, S::broadcast(TAYLOR[i]));
  return S::multiply(sum, S::power_of_two(n));
}

template <class S>
typename S::Float silu(typename S::Float x) {
  const typename S::Float negative = S::multiply(x, S::broadcast(-1.0f));
  const typename S::Float limited = S::min(S::max(negative, S::broadcast(-EXP_LIMIT)), S::broadcast(EXP_LIMIT));
  return S::divide(x, S::add(S::broadcast(1.0f), exponential<S>(limited)));
}

template <class S>
void gate(const Gating& job) {
  for (size_t row = 0; row < job.height; ++row)
    for (size_t o = 0; o < PANEL; o += S::LANES) {
      const float* at = job.pairs + row * 2 * PANEL + o;
      S::store(job.out + row * job.stride + o, S::multiply(silu<S>(S::load(at)), S::load(at + PANEL)));
    }
}

}  // namespace
}  // namespace pard
