// Which instruction set the CPU kernels run on: the best this processor has, or a lesser one named in
// DPDIFF_CPU_CAPABILITY (amx, avx512, avx2, portable), so that tests reach every path on one machine.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 11
#define DPDIFF_COMPILES_AMX 1
#endif

namespace dpdiff {
enum class Isa { portable, avx2, avx512, amx };  // amx: avx512, and tiles of bfloat16
Isa isa();

// What bfloat16 is multiplied as, where there is avx512: AMX's tiles; else pairs on AMD's processors. Other Intel ones
// multiply as many floats at the same time as pairs or more (attention's passes took 1.6 to 2.2 times as long in pairs on
// an Emerald Rapids).
enum class BFloat16As { floats, pairs, tiles };
BFloat16As bfloat16_as();
}  // namespace dpdiff
