// What a graph, an attribute or a file asks for is checked with these: sizes that do not wrap, and refusals.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pard {

// No object has more bytes: the difference of two pointers into it is a ptrdiff_t.
constexpr size_t MOST_BYTES = static_cast<size_t>(PTRDIFF_MAX);

// The product; empty if it is above MOST_BYTES. A factor of 0 makes it 0, whatever the others are.
inline std::optional<size_t> checked_product(std::initializer_list<size_t> factors) {
  size_t out = 1;
  for (const size_t factor : factors)
    if (factor == 0) return 0;
  for (const size_t factor : factors) {
    if (out > MOST_BYTES / factor) return std::nullopt;
    out *= factor;
  }
  return out;
}

// The sum; empty if it is above MOST_BYTES.
inline std::optional<size_t> checked_sum(std::initializer_list<size_t> terms) {
  size_t out = 0;
  for (const size_t term : terms) {
    if (term > MOST_BYTES - out) return std::nullopt;
    out += term;
  }
  return out;
}

template <class T>
std::string as_text(const T& part) {
  if constexpr (std::is_arithmetic_v<T>)
    return std::to_string(part);
  else
    return part;
}

// Throws std::invalid_argument unless `fits`. The message, texts and numbers, is put together only then.
template <class... Parts>
void demand(bool fits, const Parts&... message) {
  if (!fits) throw std::invalid_argument((std::string() + ... + as_text(message)));
}

}  // namespace pard
