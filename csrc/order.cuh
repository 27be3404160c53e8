// Integers that order as floats do.
#pragma once

#include "common.cuh"

namespace diffmoe {

// Compares as torch.sort orders floats: NaN is the largest, -0 equals 0. No float's key is 0.
__device__ inline unsigned key_of(float value) {
  if (value != value) return 0xffffffffu;
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

}  // namespace diffmoe
