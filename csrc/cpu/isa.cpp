#include "isa.h"

#include <stdlib.h>
#include <string.h>

#include <string>

#include <torch/csrc/stable/library.h>

namespace dpdiff {
namespace {

Isa detect() {
  Isa best = Isa::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    // One AVX-512 path, with bf16: what lacks it (before Cooper Lake and Zen 4) runs AVX2 at nearly the same clock.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* wanted = getenv("DPDIFF_CPU_CAPABILITY");
  if (wanted != nullptr && strcmp(wanted, "portable") == 0) return Isa::portable;
  if (wanted != nullptr && strcmp(wanted, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  return best;
}

std::string cpu_capability() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

bool fast_bfloat16() {
#if defined(__x86_64__)
  static const bool fast = (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0);
  return fast;
#else
  return false;
#endif
}

}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&dpdiff::cpu_capability));
}
