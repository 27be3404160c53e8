// permute and unpermute: gathers and gather-sums, no atomics, the same bits every run.
// T tokens, R rows, E experts, D columns. Rows past group_offsets[E - 1] are padding.
#include "common.cuh"
#include "ops.h"

namespace diffmoe {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // vectors that a thread moves at once

// x (T, D), token_indices (R,), group_offsets (E,) -> out (R, D), whose padding is not written
template <class Vector>
__global__ void __launch_bounds__(kThreads)
    permute_fwd_kernel(const Vector* __restrict__ x, const int* __restrict__ token_indices,
                       const int* __restrict__ group_offsets, Vector* __restrict__ out, int num_groups, int vectors) {
  const int64_t end = static_cast<int64_t>(group_offsets[num_groups - 1]) * vectors;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight);
  if (begin >= end) return;
  const int64_t first_row = begin / vectors;
  const unsigned offset = static_cast<unsigned>(begin - first_row * vectors) + threadIdx.x;
  // Past the end, where nothing is written, the last row is read: no branch keeps one load from the next.
  const int64_t last_row = end / vectors - 1;
  int tokens[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    tokens[i] = token_indices[min(first_row + (offset + i * kThreads) / vectors, last_row)];
  }
  Vector held[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    held[i] = x[static_cast<int64_t>(tokens[i]) * vectors + (offset + i * kThreads) % vectors];
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
    unpermute_fwd_kernel(const T* __restrict__ rows, const float* __restrict__ gates,
                         const int* __restrict__ token_offsets, const int* __restrict__ token_rows, T* __restrict__ out,
                         int num_tokens, int vectors) {
  using Vector = Vec<T, N>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = at / vectors;
  if (token >= num_tokens) return;
  const int64_t column = at - token * vectors;
  const int begin = token_offsets[token], end = token_offsets[token + 1];
  float total[N] = {};
  for (int first = begin; first < end; first += kInFlight) {
    int row[kInFlight];
    float gate[kInFlight];
    Vector loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) row[i] = first + i < end ? token_rows[first + i] : -1;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      loaded[i] = {};
      gate[i] = 0.0f;
      if (row[i] >= 0) {
        loaded[i] = reinterpret_cast<const Vector*>(rows)[static_cast<int64_t>(row[i]) * vectors + column];
        if (kHasGates) gate[i] = gates[row[i]];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float value = to_float(loaded[i].values[n]);
        if (row[i] >= 0) total[n] += kHasGates ? value * gate[i] : value;
      }
    }
  }
  Vector sum;
#pragma unroll
  for (int i = 0; i < N; ++i) sum.values[i] = from_float<T>(total[i]);
  reinterpret_cast<Vector*>(out)[at] = sum;
}

// rows (R, D), gates (R,), token_indices (R,), group_offsets (E,), grad_out (T, D) -> grad_rows (R, D), grad_gates (R,)
// A warp for each row; gradients of the padding are 0.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    unpermute_bwd_kernel(const T* __restrict__ rows, const float* __restrict__ gates,
                         const int* __restrict__ token_indices, const int* __restrict__ group_offsets,
                         const T* __restrict__ grad_out, T* __restrict__ grad_rows, float* __restrict__ grad_gates,
                         int num_groups, int num_rows, int vectors) {
  using Vector = Vec<T, N>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= num_rows) return;
  Vector* const grad_row = reinterpret_cast<Vector*>(grad_rows) + row * vectors;
  if (row >= group_offsets[num_groups - 1]) {
    for (int column = lane; column < vectors; column += kWarp) grad_row[column] = {};
    if (lane == 0) grad_gates[row] = 0.0f;
    return;
  }
  const Vector* const grad =
      reinterpret_cast<const Vector*>(grad_out) + static_cast<int64_t>(token_indices[row]) * vectors;
  const Vector* const value = reinterpret_cast<const Vector*>(rows) + row * vectors;
  const float gate = gates[row];
  float product = 0.0f;
  for (int first = lane; first < vectors; first += kWarp * kInFlight) {
    Vector own_grad[kInFlight], own_value[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int column = first + i * kWarp;
      own_grad[i] = own_value[i] = {};
      if (column < vectors) {
        own_grad[i] = grad[column];
        own_value[i] = value[column];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      Vector result;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        product += to_float(own_grad[i].values[n]) * to_float(own_value[i].values[n]);
        result.values[n] = from_float<T>(to_float(own_grad[i].values[n]) * gate);
      }
      if (first + i * kWarp < vectors) grad_row[first + i * kWarp] = result;
    }
  }
  product = warp_sum(product);
  if (lane == 0) grad_gates[row] = product;
}

}  // namespace

void permute_fwd(Pointer x, Pointer token_indices, Pointer group_offsets, Pointer out, int num_groups, int64_t num_rows,
                 int64_t columns, int type, Stream stream) {
  with_vectors(
      type, columns,
      [&](auto zero, auto numbers) {
        using Vector = Vec<decltype(zero), numbers()>;
        const int64_t vectors = columns / numbers();
        launch("permute_fwd", permute_fwd_kernel<Vector>, ceil_div(num_rows * vectors, kThreads * kInFlight), kThreads,
               stream, pointer<const Vector>(x), pointer<const int>(token_indices), pointer<const int>(group_offsets),
               pointer<Vector>(out), num_groups, static_cast<int>(vectors));
      },
      x, out);
}

void unpermute_fwd(Pointer rows, Pointer gates, Pointer token_offsets, Pointer token_rows, Pointer out,
                   int64_t num_tokens, int64_t columns, int type, Stream stream) {
  with_vectors(
      type, columns,
      [&](auto zero, auto numbers) {
        using T = decltype(zero);
        const int64_t vectors = columns / numbers();
        const auto kernel =
            gates ? unpermute_fwd_kernel<T, numbers(), true> : unpermute_fwd_kernel<T, numbers(), false>;
        launch("unpermute_fwd", kernel, ceil_div(num_tokens * vectors, kThreads), kThreads, stream,
               pointer<const T>(rows), pointer<const float>(gates), pointer<const int>(token_offsets),
               pointer<const int>(token_rows), pointer<T>(out), static_cast<int>(num_tokens),
               static_cast<int>(vectors));
      },
      rows, out);
}

void unpermute_bwd(Pointer rows, Pointer gates, Pointer token_indices, Pointer group_offsets, Pointer grad_out,
                   Pointer grad_rows, Pointer grad_gates, int num_groups, int64_t num_rows, int64_t columns, int type,
                   Stream stream) {
  with_vectors(
      type, columns,
      [&](auto zero, auto numbers) {
        using T = decltype(zero);
        launch("unpermute_bwd", unpermute_bwd_kernel<T, numbers()>, ceil_div(num_rows, kThreads / kWarp), kThreads,
               stream, pointer<const T>(rows), pointer<const float>(gates), pointer<const int>(token_indices),
               pointer<const int>(group_offsets), pointer<const T>(grad_out), pointer<T>(grad_rows),
               pointer<float>(grad_gates), num_groups, static_cast<int>(num_rows),
               static_cast<int>(columns / numbers()));
      },
      rows, grad_out, grad_rows);
}

}  // namespace diffmoe
