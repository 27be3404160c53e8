// What finds a cut among keys: by all threads of a block, digit by digit.
#pragma once

#include "order.cuh"

namespace diffmoe {

constexpr int kCutThreads = 1024;
constexpr int kDigits = 256;
constexpr unsigned kNotThere = 0;  // below the key of every float

// Sums by all threads of a block; every thread gets it. parts: a number a warp.
__device__ inline int block_sum(int value, int* parts) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  int sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += parts[warp];
  __syncthreads();  // the caller may write parts
  return sum;
}

// The *wanted-th largest of the keys that for_each_key passes to its argument, which are *wanted at least; 1 <=
// *wanted. On return *wanted is its rank among those equal to it.
template <class ForEachKey>
__device__ unsigned radix_select(ForEachKey for_each_key, int* wanted, int* histogram, int* parts, int* found) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned cut = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) histogram[digit] = 0;
    __syncthreads();
    for_each_key([&](unsigned key) {
      if (shift == 24 || (key ^ cut) >> (shift + 8) == 0) atomicAdd(&histogram[key >> shift & (kDigits - 1)], 1);
    });
    __syncthreads();
    // The largest digits first: thread t looks at digit 255 - t.
    const bool looks = threadIdx.x < kDigits;
    const int own = looks ? histogram[kDigits - 1 - threadIdx.x] : 0;
    int sum = warp_running_sum(own);
    if (looks && lane == kWarp - 1) parts[warp] = sum;
    __syncthreads();
    if (looks) {
      for (int before = 0; before < warp; ++before) sum += parts[before];
      if (sum >= *wanted && sum - own < *wanted) {  // one thread's
        found[0] = kDigits - 1 - threadIdx.x;
        found[1] = sum - own;
      }
    }
    __syncthreads();
    cut |= static_cast<unsigned>(found[0]) << shift;
    *wanted -= found[1];
    __syncthreads();
  }
  return cut;
}

}  // namespace diffmoe
