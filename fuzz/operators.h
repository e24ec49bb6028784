// One fuzzed input: a node, its tensors, its data file, and calls of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuzz {

// What came of it. Equal for every instruction set and every number of threads.
struct Outcome {
  uint64_t numbers = 0;  // a hash of what was computed
  size_t results = 0;    // calls that computed something
  size_t errors = 0;     // statuses with an error
};

// isa: null for the best one. threads: 1 or more, also those that pack the weights.
Outcome run(const uint8_t* data, size_t size, const char* isa, size_t threads);

// How many inputs LLVMFuzzerTestOneInput has found valid: each of their calls computed something.
size_t valid_inputs();

}  // namespace fuzz
