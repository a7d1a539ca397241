// Which instruction set the CPU kernels run on: the best this processor has, or a lesser one named in
// DPDIFF_CPU_CAPABILITY (avx512, avx2, portable), so that tests reach every path on one machine.
#pragma once

namespace dpdiff {
enum class Isa { portable, avx2, avx512 };
Isa isa();
}  // namespace dpdiff
