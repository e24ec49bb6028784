// From here on functions are compiled for PARD_TARGET (GCC and clang; MSVC needs no permission to use an intrinsic).
// A pragma is used instead of compiler flags, so that one set of flags builds every source.
#define PARD_PRAGMA_TEXT(text) _Pragma(#text)
#define PARD_PRAGMA(text) PARD_PRAGMA_TEXT(text)
#if defined(__clang__)
PARD_PRAGMA(clang attribute push(__attribute__((target(PARD_TARGET))), apply_to = function))
#elif defined(__GNUC__)
#pragma GCC push_options
PARD_PRAGMA(GCC target(PARD_TARGET))
#endif
