// What the kernels share: launches whose errors name the kernel, 16-bit floats, vectors of 16 bytes, and warps.
#pragma once

#ifndef DIFFMOE_ON_CPU  // where tests run the kernels on the CPU, they bring CUDA's names themselves
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

namespace diffmoe {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
T* pointer(Pointer address) {
  return reinterpret_cast<T*>(address);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs a kernel on a one-dimensional grid; an empty one is no launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int threads, Stream stream,
            Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "a kernel takes as many arguments as parameters");
  if (grid == 0) return;
  const auto fail = [&](const std::string& reason) {
    std::ostringstream message;
    const char* comma = "";
    message << "kernel " << name << "(";
    ((message << comma << arguments, comma = ", "), ...);
    message << ") on a grid of " << grid << " blocks of " << threads << " threads: " << reason;
    throw std::runtime_error(message.str());
  };
  if (grid < 0 || grid > INT32_MAX) fail("the grid is too large");
#ifdef DIFFMOE_ON_CPU
  (void)stream;
  on_cpu::run(name, kernel, grid, threads, static_cast<Parameters>(arguments)...);
#else
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  kernel<<<static_cast<unsigned>(grid), threads, 0, cuda_stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    const auto later = {cudaErrorIllegalAddress,      cudaErrorMisalignedAddress,  cudaErrorAssert,
                        cudaErrorLaunchFailure,       cudaErrorIllegalInstruction, cudaErrorInvalidPc,
                        cudaErrorInvalidAddressSpace, cudaErrorHardwareStackError, cudaErrorECCUncorrectable,
                        cudaErrorLaunchTimeout};
    const bool is_asynchronous = std::find(later.begin(), later.end(), error) != later.end();
    fail(std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error) +
         (is_asynchronous ? ", in this kernel or one that was launched before it" : ""));
  }
#endif
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// N numbers that lie side by side and are moved at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T values[N];
};

// What Python calls a dtype by.
enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Calls function(T{}) with the type's T.
template <class Function>
void with_type(int type, Function function) {
  switch (static_cast<Type>(type)) {
    case Type::kFloat32:
      return function(float{});
    case Type::kBFloat16:
      return function(BFloat16{});
    case Type::kFloat16:
      return function(Half{});
  }
  throw std::invalid_argument("type: expected 0 for float32, 1 for bfloat16 or 2 for float16, got " +
                              std::to_string(type));
}

// Calls function(T{}, N) with N, a constant, the numbers in 16 bytes where every row begins at such an address, else 1.
template <class Function, class... Addresses>
void with_vectors(int type, int64_t columns, Function function, Addresses... addresses) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kNumbers = 16 / sizeof(T);
    if (columns % kNumbers == 0 && ((addresses | ...) % 16) == 0) {
      function(zero, std::integral_constant<int, kNumbers>{});
    } else {
      function(zero, std::integral_constant<int, 1>{});
    }
  });
}

template <class T>
__device__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

// Of a lane and all below it.
__device__ inline int warp_running_sum(int x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kWholeWarp, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

}  // namespace diffmoe
