#include "allocations.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<size_t> left{0};  // allocations up to the one that is refused; 0: none is
std::atomic<bool> refused{false};
thread_local size_t uncounted = 0;

bool is_refused(size_t bytes) {
  if (uncounted) return false;
  size_t now = left.load(std::memory_order_relaxed);
  while (now > 0 && !left.compare_exchange_weak(now, now - 1)) {
  }
  if (now == 1) refused = true;
  return now == 1 || bytes > fuzz::MOST_BYTES;
}

// Exactly as large as asked for, so that AddressSanitizer sees one step beyond.
void* allocated(size_t bytes, size_t alignment) {
  if (is_refused(bytes)) return nullptr;
#if defined(_WIN32)
  return _aligned_malloc(bytes ? bytes : 1, alignment);
#else
  void* out = nullptr;
  return posix_memalign(&out, alignment, bytes ? bytes : 1) ? nullptr : out;
#endif
}

void* demanded(size_t bytes, size_t alignment) {
  void* out = allocated(bytes, alignment);
  if (!out) throw std::bad_alloc();
  return out;
}

void freed(void* at) {
#if defined(_WIN32)
  _aligned_free(at);
#else
  std::free(at);
#endif
}

constexpr size_t DEFAULT = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

namespace fuzz {

void refuse_allocation(size_t nth) {
  refused = false;
  left = nth;
}

bool was_refused() { return refused; }

Uncounted::Uncounted() { ++uncounted; }
Uncounted::~Uncounted() { --uncounted; }

}  // namespace fuzz

void* operator new(size_t bytes) { return demanded(bytes, DEFAULT); }
void* operator new[](size_t bytes) { return demanded(bytes, DEFAULT); }
void* operator new(size_t bytes, std::align_val_t to) { return demanded(bytes, static_cast<size_t>(to)); }
void* operator new[](size_t bytes, std::align_val_t to) { return demanded(bytes, static_cast<size_t>(to)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return allocated(bytes, DEFAULT); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return allocated(bytes, DEFAULT); }
void operator delete(void* at) noexcept { freed(at); }
void operator delete[](void* at) noexcept { freed(at); }
void operator delete(void* at, size_t) noexcept { freed(at); }
void operator delete[](void* at, size_t) noexcept { freed(at); }
void operator delete(void* at, std::align_val_t) noexcept { freed(at); }
void operator delete[](void* at, std::align_val_t) noexcept { freed(at); }
void operator delete(void* at, size_t, std::align_val_t) noexcept { freed(at); }
void operator delete[](void* at, size_t, std::align_val_t) noexcept { freed(at); }
