// The instruction set whose kernels are in use.
#pragma once

#include "isa/isa.h"

namespace pard {

const Isa* find_isa(const char* name);  // null where this processor does not have it
const Isa& selected_isa();              // the best one, unless another was selected
bool select_isa(const char* name);      // null: the best; false where this processor does not have it

}  // namespace pard
