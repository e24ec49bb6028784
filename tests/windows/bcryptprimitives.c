// The one function of Windows' bcryptprimitives.dll that Rust's standard library calls, and that Wine 8 does not have.
#include <windows.h>

#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T size) { return RtlGenRandom(data, (ULONG)size); }
