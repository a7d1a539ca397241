// The types of numbers that kernels take beside float32.
#pragma once

namespace dpdiff {
enum class DType { float32, float16, bfloat16 };
}  // namespace dpdiff
