// How much of the library's code has run.
#pragma once

#include <cstddef>

namespace fuzz {

// Blocks of code, of those that were compiled with -fsanitize-coverage=trace-pc.
size_t reached_blocks();

}  // namespace fuzz
