// Shares work among the caller's threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <thread>

namespace pard {

// Runs task(data, i) for i < count, on several threads or not, and returns when all are done.
struct Parallel {
  void* context;
  void (*run)(void* context, void (*task)(void* data, size_t i), size_t count, void* data);
};

inline size_t processors() {
  static const size_t count = std::max(std::thread::hardware_concurrency(), 1u);
  return count;
}

}  // namespace pard
