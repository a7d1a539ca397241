#include "isa.h"

#include <stdlib.h>
#include <string.h>
#if defined(DPDIFF_COMPILES_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <string>

#include <torch/csrc/stable/library.h>

namespace dpdiff {
namespace {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

// Whether there are AMX's tiles of bfloat16, and the system lets this process have them: it has to be asked.
bool amx() {
#if defined(DPDIFF_COMPILES_AMX)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16) && (edx & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  Isa best = Isa::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    // One AVX-512 path, with bf16: what lacks it (before Cooper Lake and Zen 4) runs AVX2 at nearly the same clock.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) {
      best = amx() ? Isa::amx : Isa::avx512;
    }
  }
#endif
  const char* wanted = getenv("DPDIFF_CPU_CAPABILITY");
  for (const Isa lesser : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (wanted != nullptr && strcmp(wanted, name(lesser)) == 0) return std::min(best, lesser);
  }
  return best;
}

std::string cpu_capability() { return name(isa()); }

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

BFloat16As bfloat16_as() {
  if (isa() == Isa::amx) return BFloat16As::tiles;
#if defined(__x86_64__)
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0);
  if (isa() == Isa::avx512 && amd) return BFloat16As::pairs;
#endif
  return BFloat16As::floats;
}

}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&dpdiff::cpu_capability));
}
