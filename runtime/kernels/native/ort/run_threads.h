// Threads of our own, for the functions and fuzzers that run without a session.
#pragma once

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

namespace pard {

// A pool for one call: `context` points to the number of threads.
inline void run_threads(void* context, void (*task)(void*, size_t), size_t count, void* data) {
  std::vector<std::thread> helpers;
  const size_t threads = std::min(*static_cast<size_t*>(context), count);
  const auto run = [=](size_t first) {
    for (size_t i = first; i < count; i += threads) task(data, i);
  };
  for (size_t i = 1; i < threads; ++i) helpers.emplace_back(run, i);
  run(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace pard
