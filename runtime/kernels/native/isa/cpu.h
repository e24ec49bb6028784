// The instruction sets that this processor and its operating system support.
#pragma once

namespace pard {

bool cpu_has_avx2();
bool cpu_has_avx_vnni();
bool cpu_has_avx512_vnni();

}  // namespace pard
