// permute and unpermute: gathers and gather-sums, no atomics, the same bits every run.
// T tokens, R rows, E experts, D columns. Rows past group_offsets[E - 1] are padding.
#include "common.cuh"
#include "ops.h"

namespace diffmoe {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // runs that a thread moves at once

// x (T, D), token_indices (R,), group_offsets (E,) -> out (R, D), whose padding is not written
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Unit* __restrict__ x, const int* __restrict__ token_indices,
                  const int* __restrict__ group_offsets, Unit* __restrict__ out, int num_groups, int units) {
  const int64_t end = static_cast<int64_t>(group_offsets[num_groups - 1]) * units;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight);
  if (begin >= end) return;
  const int64_t first_row = begin / units;
  const unsigned offset = static_cast<unsigned>(begin - first_row * units) + threadIdx.x;
  Unit held[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const unsigned place = offset + i * kThreads;
    if (begin + threadIdx.x + i * kThreads < end) {
      const unsigned down = place / units;
      const int64_t token = token_indices[first_row + down];
      held[i] = x[token * units + (place - down * units)];
    }
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = begin + threadIdx.x + i * kThreads;
    if (at < end) out[at] = held[i];
  }
}

// rows (R, D), gates (R,), token_offsets (T + 1,), token_rows (R,) -> out (T, D)
template <class T, int N, bool kHasGates>
__global__ void __launch_bounds__(kThreads)
    gather_sum_kernel(const T* __restrict__ rows, const float* __restrict__ gates,
                      const int* __restrict__ token_offsets, const int* __restrict__ token_rows, T* __restrict__ out,
                      int num_tokens, int units) {
  using Unit = Run<T, N>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = at / units;
  if (token >= num_tokens) return;
  const int64_t column = at - token * units;
  const int begin = token_offsets[token], end = token_offsets[token + 1];
  float total[N] = {};
#pragma unroll 4
  for (int slot = begin; slot < end; ++slot) {
    const int64_t row = token_rows[slot];
    const Unit unit = reinterpret_cast<const Unit*>(rows)[row * units + column];
    const float gate = kHasGates ? gates[row] : 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += kHasGates ? to_float(unit.values[i]) * gate : to_float(unit.values[i]);
  }
  Unit sum;
#pragma unroll
  for (int i = 0; i < N; ++i) sum.values[i] = from_float<T>(total[i]);
  reinterpret_cast<Unit*>(out)[at] = sum;
}

// rows (R, D), gates (R,), token_indices (R,), group_offsets (E,), grad_out (T, D) -> grad_rows (R, D), grad_gates (R,)
// A warp for each row; gradients of the padding are 0.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    unpermute_backward_kernel(const T* __restrict__ rows, const float* __restrict__ gates,
                              const int* __restrict__ token_indices, const int* __restrict__ group_offsets,
                              const T* __restrict__ grad_out, T* __restrict__ grad_rows, float* __restrict__ grad_gates,
                              int num_groups, int num_rows, int units) {
  using Unit = Run<T, N>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= num_rows) return;
  const bool is_real = row < group_offsets[num_groups - 1];
  const int64_t token = is_real ? token_indices[row] : 0;
  const float gate = is_real ? gates[row] : 0.0f;
  float product = 0.0f;
#pragma unroll 4
  for (int column = lane; column < units; column += kWarp) {
    Unit result = {};
    if (is_real) {
      const Unit grad = reinterpret_cast<const Unit*>(grad_out)[token * units + column];
      const Unit value = reinterpret_cast<const Unit*>(rows)[row * units + column];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        product += to_float(grad.values[i]) * to_float(value.values[i]);
        result.values[i] = from_float<T>(to_float(grad.values[i]) * gate);
      }
    }
    reinterpret_cast<Unit*>(grad_rows)[row * units + column] = result;
  }
  product = warp_sum(product);
  if (lane == 0) grad_gates[row] = product;
}

}  // namespace

void gather(Pointer x, Pointer token_indices, Pointer group_offsets, Pointer out, int num_groups, int64_t num_rows,
            int64_t columns, int type, Stream stream) {
  with_runs(
      type, columns,
      [&](auto zero, auto numbers) {
        using Unit = Run<decltype(zero), numbers()>;
        const int64_t units = columns / numbers();
        launch("gather", gather_kernel<Unit>, ceil_div(num_rows * units, kThreads * kInFlight), kThreads, stream,
               pointer<const Unit>(x), pointer<const int>(token_indices), pointer<const int>(group_offsets),
               pointer<Unit>(out), num_groups, static_cast<int>(units));
      },
      x, out);
}

void gather_sum(Pointer rows, Pointer gates, Pointer token_offsets, Pointer token_rows, Pointer out, int64_t num_tokens,
                int64_t columns, int type, Stream stream) {
  with_runs(
      type, columns,
      [&](auto zero, auto numbers) {
        using T = decltype(zero);
        const int64_t units = columns / numbers();
        const auto kernel = gates ? gather_sum_kernel<T, numbers(), true> : gather_sum_kernel<T, numbers(), false>;
        launch("gather_sum", kernel, ceil_div(num_tokens * units, kThreads), kThreads, stream, pointer<const T>(rows),
               pointer<const float>(gates), pointer<const int>(token_offsets), pointer<const int>(token_rows),
               pointer<T>(out), static_cast<int>(num_tokens), static_cast<int>(units));
      },
      rows, out);
}

void unpermute_backward(Pointer rows, Pointer gates, Pointer token_indices, Pointer group_offsets, Pointer grad_out,
                        Pointer grad_rows, Pointer grad_gates, int num_groups, int64_t num_rows, int64_t columns,
                        int type, Stream stream) {
  with_runs(
      type, columns,
      [&](auto zero, auto numbers) {
        using T = decltype(zero);
        launch("unpermute_backward", unpermute_backward_kernel<T, numbers()>, ceil_div(num_rows, kThreads / kWarp),
               kThreads, stream, pointer<const T>(rows), pointer<const float>(gates), pointer<const int>(token_indices),
               pointer<const int>(group_offsets), pointer<const T>(grad_out), pointer<T>(grad_rows),
               pointer<float>(grad_gates), num_groups, static_cast<int>(num_rows),
               static_cast<int>(columns / numbers()));
      },
      rows, grad_out, grad_rows);
}

}  // namespace diffmoe
