// Memory that is refused on purpose: operator new of these programs.
#pragma once

#include <cstddef>

namespace fuzz {

// Above it an allocation is refused as by a machine that has no more.
constexpr size_t MOST_BYTES = size_t{64} << 20;

// From now on the nth allocation is refused (0: none), of those on all threads outside `Uncounted`.
void refuse_allocation(size_t nth);

// Whether it has been refused since.
bool was_refused();

// While it lives, this thread's allocations are the program's own: neither counted nor refused.
class Uncounted {
 public:
  Uncounted();
  ~Uncounted();
  Uncounted(const Uncounted&) = delete;
  Uncounted& operator=(const Uncounted&) = delete;
};

}  // namespace fuzz
