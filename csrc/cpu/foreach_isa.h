// Compiles one kernel file for every instruction set and picks one at run time.
//
//   #define DPDIFF_KERNELS "nearest_kernels.h"   // included below once per instruction set, inside its namespace
//   #include "foreach_isa.h"
//   ... DPDIFF_DISPATCH(nearest_forward)(args) ...
//
// Each copy sees simd.h with vectors of its own width, and may test DPDIFF_AVX512 / DPDIFF_AVX2; that of AVX-512 has amx.h
// besides (DPDIFF_AMX), for those processors on which bfloat16_as() says so. Include every
// standard header before this file: what is included inside a target region is compiled for that target.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "isa.h"

#define DPDIFF_WIDTH 4
namespace dpdiff::portable {
#include "simd.h"
#include DPDIFF_KERNELS
}  // namespace dpdiff::portable
#undef DPDIFF_WIDTH

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics start from undefined values
#endif
#include <immintrin.h>

#define DPDIFF_WIDTH 8
#define DPDIFF_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace dpdiff::avx2 {
#include "simd.h"
#include DPDIFF_KERNELS
}  // namespace dpdiff::avx2
#pragma GCC pop_options
#undef DPDIFF_AVX2
#undef DPDIFF_WIDTH

#define DPDIFF_WIDTH 16
#define DPDIFF_AVX512 1
#if defined(DPDIFF_COMPILES_AMX)
#define DPDIFF_AMX 1
#endif
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace dpdiff::avx512 {
#include "simd.h"
#if defined(DPDIFF_AMX)
#include "amx.h"
#endif
#include DPDIFF_KERNELS
}  // namespace dpdiff::avx512
#pragma GCC pop_options
#undef DPDIFF_AMX
#undef DPDIFF_AVX512
#undef DPDIFF_WIDTH

#define DPDIFF_DISPATCH(function)                                                 \
  (::dpdiff::isa() >= ::dpdiff::Isa::avx512 ? &::dpdiff::avx512::function         \
   : ::dpdiff::isa() == ::dpdiff::Isa::avx2 ? &::dpdiff::avx2::function           \
                                            : &::dpdiff::portable::function)
#else
#define DPDIFF_DISPATCH(function) (&::dpdiff::portable::function)
#endif
