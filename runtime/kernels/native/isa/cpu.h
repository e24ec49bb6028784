// The instruction sets that this processor and its operating system support.
// Each is defined on its own architecture alone.
#pragma once

namespace pard {

bool cpu_has_avx2();
bool cpu_has_avx_vnni();
bool cpu_has_avx512_vnni();

bool cpu_has_dotprod();  // of int8, optional from Armv8.2 on
bool cpu_has_i8mm();     // matrix products of int8, optional from Armv8.2 on

}  // namespace pard
