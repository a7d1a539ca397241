// Which instruction set the CPU kernels run on: the best this processor has, or a lesser one named in
// DPDIFF_CPU_CAPABILITY (avx512, avx2, portable), so that tests reach every path on one machine.
#pragma once

namespace dpdiff {
enum class Isa { portable, avx2, avx512 };
Isa isa();

// Whether avx512's products of bfloat16 pairs are the fastest: on AMD's processors. Intel's do as many of float32 at the same
// time or more (attention's passes took 1.6 to 2.2 times as long in pairs on an Emerald Rapids).
bool fast_bfloat16();
}  // namespace dpdiff
