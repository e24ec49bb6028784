#include "isa/architecture.h"
#if defined(PARD_AARCH64)
#include "isa/cpu.h"

#if defined(_WIN32)
#include <windows.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pard {
namespace {

// The numbers are parts of the systems' binary interfaces; older headers do not name all of them.
#if defined(_WIN32)
constexpr DWORD DOTPROD = 43, I8MM = 66;  // PF_ARM_V82_..._INSTRUCTIONS_AVAILABLE

bool has(DWORD feature) { return IsProcessorFeaturePresent(feature) != 0; }

bool find_dotprod() { return has(DOTPROD); }
bool find_i8mm() { return has(DOTPROD) && has(I8MM); }
#elif defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

bool find_dotprod() { return true; }  // every Mac with an Arm processor; macOS 11 has no name for it
bool find_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
constexpr unsigned long ASIMDDP = 1ul << 20, I8MM = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM

bool find_dotprod() { return (getauxval(AT_HWCAP) & ASIMDDP) != 0; }
bool find_i8mm() { return find_dotprod() && (getauxval(AT_HWCAP2) & I8MM) != 0; }
#else
bool find_dotprod() { return false; }
bool find_i8mm() { return false; }
#endif

}  // namespace

bool cpu_has_dotprod() {
  static const bool out = find_dotprod();
  return out;
}

bool cpu_has_i8mm() {
  static const bool out = find_i8mm();
  return out;
}

}  // namespace pard

#endif
