#include "isa/dispatch.h"

#include <atomic>
#include <cstring>

#include "isa/architecture.h"

namespace pard {
namespace {

#if defined(PARD_X86_64)
const Isa* const BEST_FIRST[] = {&AVX512_VNNI, &AVX_VNNI, &AVX2, &REFERENCE};
#elif defined(PARD_AARCH64)
const Isa* const BEST_FIRST[] = {&NEON_I8MM, &NEON_DOTPROD, &REFERENCE};
#else
const Isa* const BEST_FIRST[] = {&REFERENCE};
#endif

std::atomic<const Isa*> selected{nullptr};

const Isa* best() {
  for (const Isa* isa : BEST_FIRST)
    if (isa->supported()) return isa;
  return &REFERENCE;
}

}  // namespace

const Isa* find_isa(const char* name) {
  for (const Isa* isa : BEST_FIRST)
    if (std::strcmp(isa->name, name) == 0) return isa->supported() ? isa : nullptr;
  return nullptr;
}

const Isa& selected_isa() {
  if (!selected) select_isa(nullptr);
  return *selected;
}

bool select_isa(const char* name) {
  const Isa* isa = name ? find_isa(name) : best();
  if (isa) selected = isa;
  return isa != nullptr;
}

}  // namespace pard
