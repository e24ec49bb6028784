#pragma once

#include <cstdint>
#include <cstring>

namespace pard {

// The float32 of a half-precision number's bits. Exact for every number; infinities and NaN stay what they are.
inline float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  uint32_t word = magnitude << 13;
  float out;
  if (magnitude >= 0x7c00) {
    word |= 0x7f800000;
  } else if (magnitude >= 0x0400) {
    word += uint32_t{112} << 23;  // the difference of the exponents' biases
  } else {
    out = static_cast<float>(magnitude) * 0x1p-24f;  // a subnormal number, or zero
    std::memcpy(&word, &out, sizeof word);
  }
  word |= sign;
  std::memcpy(&out, &word, sizeof out);
  return out;
}

}  // namespace pard
