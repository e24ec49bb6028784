// The processor architecture of this build. The sources of instruction sets of other architectures compile to nothing,
// so that one list of sources and one set of flags builds the library everywhere.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define PARD_X86_64
#elif defined(__aarch64__)  // not of Microsoft's compiler, whose NEON types are all one type; clang-cl has it
#define PARD_AARCH64
#endif
