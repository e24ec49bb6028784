// The tensors of one matrix in the data file of a model folder. Neither the file nor what a graph says of it is trusted.
#pragma once

#include <string>

#include "matmul/weights.h"
#include "ort/node.h"

namespace pard {

// Readers of the tensors at `B_offset`, `scales_offset`, `zero_points_offset` and `minimums_offset` of the file, each
// name behind `prefix`. Scales are float32, or float16 if `scales_half` is 1; minimums are float16.
// Throws std::invalid_argument if the attributes do not fit the layout, or the file is no regular file that holds all
// that the layout asks for.
Source file_source(const Node& node, const Layout& layout, const std::string& path, const std::string& prefix);

}  // namespace pard
