// router_topk: a counting sort in two launches, no global atomics, the same bits every run.
// T tokens, E experts, K choices a token, R = T K rows, C chunks of equal size, the last one possibly shorter.
//
// 1. router_topk_choose_kernel: a warp scores a token and chooses its experts; a block counts its chunk's choices.
// 2. router_topk_place_kernel: a block sums the counts of all chunks and of those before its own, ranks its tokens
//    among those of its chunk by bits, one a token, and writes weights and record.
#include "common.cuh"
#include "ops.h"
#include "order.cuh"

namespace diffmoe {
namespace {

constexpr int kMaxExperts = 256;
constexpr int kMaxChunks = 256;  // all counts are read by every block of router_topk_place_kernel
constexpr int kChooseThreads = 1024;
constexpr int kPlaceThreads = 256;
constexpr int kWords = kPlaceThreads / kWarp;
constexpr unsigned kTaken = 0;  // no float's key

// The largest of a warp's keys, and the first of those that have it: a lane's j-th key is number 32 j + lane.
template <int J>
__device__ int first_largest(const unsigned (&keys)[J], int lane, unsigned* largest) {
  unsigned most = keys[0];
#pragma unroll
  for (int j = 1; j < J; ++j) most = max(most, keys[j]);
  most = __reduce_max_sync(kWholeWarp, most);
  unsigned place = kWarp * J;
#pragma unroll
  for (int j = J - 1; j >= 0; --j) {
    if (keys[j] == most) place = j * kWarp + lane;
  }
  *largest = most;
  return __reduce_min_sync(kWholeWarp, place);
}

// Which of a token's groups of experts may be chosen from: those of the largest sums of their two best keys. Others'
// keys become that of the fill.
template <int J>
__device__ void mask_groups(unsigned (&keys)[J], int lane, int num_experts, int num_groups, int top_groups,
                            float fill) {
  const int size = num_experts / num_groups;
  unsigned totals[J] = {};  // of group 32 j + lane
  for (int group = 0; group < num_groups; ++group) {
    unsigned members[J];
#pragma unroll
    for (int j = 0; j < J; ++j) members[j] = (j * kWarp + lane) / size == group ? keys[j] : kTaken;
    unsigned best;
    const int first = first_largest(members, lane, &best);
    float total = value_of(best);
    if (size > 1) {
#pragma unroll
      for (int j = 0; j < J; ++j) {
        if (j * kWarp + lane == first) members[j] = kTaken;
      }
      first_largest(members, lane, &best);
      total += value_of(best);
    }
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (j * kWarp + lane == group) totals[j] = key_of(total);
    }
  }
  unsigned chosen[J] = {};  // a bit each: whether expert 32 j + lane is in a chosen group
  for (int n = 0; n < top_groups; ++n) {
    unsigned best;
    const int group = first_largest(totals, lane, &best);
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (j * kWarp + lane == group) totals[j] = kTaken;
      if ((j * kWarp + lane) / size == group) chosen[j] = 1;
    }
  }
#pragma unroll
  for (int j = 0; j < J; ++j) {
    if (!chosen[j] && j * kWarp + lane < num_experts) keys[j] = key_of(fill);
  }
}

// logits (T, E), bias (E,) or none -> scores (T, E), topk_ids (T, K), counts (C, E)
template <class T, int J>
__global__ void __launch_bounds__(kChooseThreads)
    router_topk_choose_kernel(const T* __restrict__ logits, const float* __restrict__ bias, float* __restrict__ scores,
                              int* __restrict__ topk_ids, int* __restrict__ counts, int num_tokens, int chunk,
                              int num_experts, int top_k, bool softmax, int num_groups, int top_groups, float fill) {
  __shared__ int own_counts[kMaxExperts];
  const int lane = threadIdx.x % kWarp;
  for (int expert = threadIdx.x; expert < num_experts; expert += kChooseThreads) own_counts[expert] = 0;
  __syncthreads();
  const int begin = blockIdx.x * chunk, end = min(begin + chunk, num_tokens);
  for (int token = begin + threadIdx.x / kWarp; token < end; token += kChooseThreads / kWarp) {
    const int64_t at = static_cast<int64_t>(token) * num_experts + lane;
    float score[J];
#pragma unroll
    for (int j = 0; j < J; ++j)
      score[j] = j * kWarp + lane < num_experts ? to_float(logits[at + j * kWarp]) : -INFINITY;
    if (softmax) {
      float most = score[0], total = 0.0f;
#pragma unroll
      for (int j = 1; j < J; ++j) most = fmaxf(most, score[j]);
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, step));
#pragma unroll
      for (int j = 0; j < J; ++j) {
        score[j] = j * kWarp + lane < num_experts ? expf(score[j] - most) : 0.0f;
        total += score[j];
      }
      total = warp_sum(total);
#pragma unroll
      for (int j = 0; j < J; ++j) score[j] /= total;
    } else {
#pragma unroll
      for (int j = 0; j < J; ++j) score[j] = 1.0f / (1.0f + expf(-score[j]));
    }
    unsigned keys[J];
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int expert = j * kWarp + lane;
      keys[j] = kTaken;
      if (expert < num_experts) {
        scores[at + j * kWarp] = score[j];
        keys[j] = key_of(bias ? score[j] + bias[expert] : score[j]);
      }
    }
    if (top_groups < num_groups) mask_groups(keys, lane, num_experts, num_groups, top_groups, fill);
    for (int begin_slot = 0; begin_slot < top_k; begin_slot += kWarp) {
      const int slots = min(top_k - begin_slot, kWarp);
      int choice = 0;  // of slot begin_slot + lane
      for (int slot = 0; slot < slots; ++slot) {
        unsigned largest;
        const int expert = first_largest(keys, lane, &largest);
#pragma unroll
        for (int j = 0; j < J; ++j) {
          if (j * kWarp + lane == expert) keys[j] = kTaken;
        }
        if (lane == slot) choice = expert;
      }
      if (lane < slots) {
        topk_ids[static_cast<int64_t>(token) * top_k + begin_slot + lane] = choice;
        atomicAdd(&own_counts[choice], 1);
      }
    }
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < num_experts; expert += kChooseThreads) {
    counts[blockIdx.x * num_experts + expert] = own_counts[expert];
  }
}

// scores (T, E), topk_ids (T, K), counts (C, E) -> topk_weights (T, K), token_indices (R,), gates (R,),
// group_offsets (E,), token_offsets (T + 1,), token_rows (R,)
__global__ void __launch_bounds__(kPlaceThreads)
    router_topk_place_kernel(const float* __restrict__ scores, const int* __restrict__ topk_ids,
                             const int* __restrict__ counts, float* __restrict__ topk_weights,
                             int* __restrict__ token_indices, float* __restrict__ gates,
                             int* __restrict__ group_offsets, int* __restrict__ token_offsets,
                             int* __restrict__ token_rows, int num_tokens, int chunk, int num_chunks, int num_experts,
                             int top_k, bool normalize, float scale) {
  __shared__ int next_row[kMaxExperts];  // of the chunk's next token that chose the expert
  __shared__ int totals[kMaxExperts];
  __shared__ unsigned choosers[kWords][kMaxExperts];  // of 32 tokens each, a bit for each that chose the expert
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  for (int expert = threadIdx.x; expert < num_experts; expert += kPlaceThreads) next_row[expert] = totals[expert] = 0;
  __syncthreads();
  for (int expert = lane; expert < num_experts; expert += kWarp) {
    int before = 0, all = 0;
#pragma unroll 4
    for (int other = warp; other < num_chunks; other += kWords) {
      const int count = counts[other * num_experts + expert];
      all += count;
      if (other < static_cast<int>(blockIdx.x)) before += count;
    }
    atomicAdd(&next_row[expert], before);
    atomicAdd(&totals[expert], all);
  }
  __syncthreads();
  if (warp == 0) {  // where each expert's rows begin
    int rows = 0;
    for (int first = 0; first < num_experts; first += kWarp) {
      const int expert = first + lane;
      const int own = expert < num_experts ? totals[expert] : 0;
      int sum = warp_running_sum(own);
      if (expert < num_experts) {
        next_row[expert] += rows + sum - own;
        if (blockIdx.x == 0) group_offsets[expert] = rows + sum;
      }
      rows += __shfl_sync(kWholeWarp, sum, kWarp - 1);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) token_offsets[0] = 0;

  const int begin = blockIdx.x * chunk, end = min(begin + chunk, num_tokens);
  for (int first = begin; first < end; first += kPlaceThreads) {
    const int token = first + threadIdx.x;
    const int64_t slots = static_cast<int64_t>(token) * top_k;
    for (int place = threadIdx.x; place < kWords * num_experts; place += kPlaceThreads) {
      choosers[place / num_experts][place % num_experts] = 0;
    }
    __syncthreads();
    float total = 0.0f;
    if (token < end) {
      for (int slot = 0; slot < top_k; ++slot) {
        const int expert = topk_ids[slots + slot];
        atomicOr(&choosers[warp][expert], 1u << lane);
        if (normalize) total += scores[static_cast<int64_t>(token) * num_experts + expert];
      }
      token_offsets[token + 1] = (token + 1) * top_k;
    }
    __syncthreads();
    if (token < end) {
      for (int slot = 0; slot < top_k; ++slot) {
        const int expert = topk_ids[slots + slot];
        float weight = scores[static_cast<int64_t>(token) * num_experts + expert];
        if (normalize) weight /= total + 1e-20f;
        weight *= scale;
        int row = next_row[expert] + __popc(choosers[warp][expert] & ((1u << lane) - 1));
        for (int word = 0; word < warp; ++word) row += __popc(choosers[word][expert]);
        topk_weights[slots + slot] = weight;
        token_rows[slots + slot] = row;
        token_indices[row] = token;
        gates[row] = weight;
      }
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < num_experts; expert += kPlaceThreads) {
      int taken = 0;
#pragma unroll
      for (int word = 0; word < kWords; ++word) taken += __popc(choosers[word][expert]);
      next_row[expert] += taken;
    }
    __syncthreads();
  }
}

// grad_weights (T, K), grad_scores (T, E), grad_gates (R,), each or none, scores (T, E), topk_ids (T, K),
// token_rows (R,) -> grad_logits (T, E). A warp for each token.
template <class T, int J>
__global__ void __launch_bounds__(kPlaceThreads, 4)
    router_topk_bwd_kernel(const float* __restrict__ grad_weights, const float* __restrict__ grad_scores,
                           const float* __restrict__ grad_gates, const float* __restrict__ scores,
                           const int* __restrict__ topk_ids, const int* __restrict__ token_rows,
                           T* __restrict__ grad_logits, int num_tokens, int num_experts, int top_k, bool softmax,
                           bool normalize, float scale) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kPlaceThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (token >= num_tokens) return;
  const int64_t at = token * num_experts, slots = token * top_k;
  const auto grad_of_slot = [&](int slot) {
    float grad = grad_weights ? grad_weights[slots + slot] : 0.0f;
    if (grad_gates) grad += grad_gates[token_rows[slots + slot]];
    return grad;
  };
  float score[J], grad[J];
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const int expert = j * kWarp + lane;
    score[j] = expert < num_experts ? scores[at + expert] : 0.0f;
    grad[j] = grad_scores && expert < num_experts ? grad_scores[at + expert] : 0.0f;
  }
  if (grad_weights || grad_gates) {
    float total = 0.0f, mean = 0.0f, inverse = 1.0f;
    if (normalize) {
      for (int slot = lane; slot < top_k; slot += kWarp) {
        const float weight = scores[at + topk_ids[slots + slot]];
        total += weight;
        mean += weight * grad_of_slot(slot);
      }
      inverse = 1.0f / (warp_sum(total) + 1e-20f);
      mean = warp_sum(mean) * inverse;
    }
    for (int slot = 0; slot < top_k; ++slot) {
      const int expert = topk_ids[slots + slot];
      const float own = (grad_of_slot(slot) - mean) * inverse * scale;
#pragma unroll
      for (int j = 0; j < J; ++j) {
        if (j * kWarp + lane == expert) grad[j] += own;
      }
    }
  }
  float shared = 0.0f;
  if (softmax) {
#pragma unroll
    for (int j = 0; j < J; ++j) shared += grad[j] * score[j];
    shared = warp_sum(shared);
  }
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const float slope = softmax ? score[j] : (1.0f - score[j]) * score[j];
    const int expert = j * kWarp + lane;
    if (expert < num_experts) grad_logits[at + expert] = from_float<T>((grad[j] - shared) * slope);
  }
}

// Calls function(J) with J, a constant, the experts of a lane.
template <class Function>
void with_experts_of_lane(int num_experts, Function function) {
  if (num_experts <= kWarp) return function(std::integral_constant<int, 1>{});
  if (num_experts <= 2 * kWarp) return function(std::integral_constant<int, 2>{});
  if (num_experts <= 4 * kWarp) return function(std::integral_constant<int, 4>{});
  if (num_experts <= kMaxExperts) return function(std::integral_constant<int, 8>{});
  throw std::invalid_argument("num_experts: expected at most 256, got " + std::to_string(num_experts));
}

}  // namespace

int router_chunks(int64_t num_tokens) {
  return static_cast<int>(ceil_div(num_tokens, std::max<int64_t>(kWarp, ceil_div(num_tokens, kMaxChunks))));
}

void router_topk_fwd(Pointer logits, Pointer bias, Pointer scores, Pointer topk_ids, Pointer counts,
                     Pointer topk_weights, Pointer token_indices, Pointer gates, Pointer group_offsets,
                     Pointer token_offsets, Pointer token_rows, int64_t num_tokens, int num_experts, int top_k,
                     int type, bool softmax, int num_groups, int top_groups, float fill, bool normalize, float scale,
                     Stream stream) {
  const int num_chunks = router_chunks(num_tokens);
  const int chunk = static_cast<int>(ceil_div(num_tokens, num_chunks)), tokens = static_cast<int>(num_tokens);
  with_type(type, [&](auto zero) {
    with_experts_of_lane(num_experts, [&](auto of_lane) {
      using T = decltype(zero);
      launch("router_topk_choose", router_topk_choose_kernel<T, of_lane()>, num_chunks, kChooseThreads, stream,
             pointer<const T>(logits), pointer<const float>(bias), pointer<float>(scores), pointer<int>(topk_ids),
             pointer<int>(counts), tokens, chunk, num_experts, top_k, softmax, num_groups, top_groups, fill);
    });
  });
  launch("router_topk_place", router_topk_place_kernel, num_chunks, kPlaceThreads, stream, pointer<const float>(scores),
         pointer<const int>(topk_ids), pointer<const int>(counts), pointer<float>(topk_weights),
         pointer<int>(token_indices), pointer<float>(gates), pointer<int>(group_offsets), pointer<int>(token_offsets),
         pointer<int>(token_rows), tokens, chunk, num_chunks, num_experts, top_k, normalize, scale);
}

void router_topk_bwd(Pointer grad_weights, Pointer grad_scores, Pointer grad_gates, Pointer scores, Pointer topk_ids,
                     Pointer token_rows, Pointer grad_logits, int64_t num_tokens, int num_experts, int top_k, int type,
                     bool softmax, bool normalize, float scale, Stream stream) {
  with_type(type, [&](auto zero) {
    with_experts_of_lane(num_experts, [&](auto of_lane) {
      using T = decltype(zero);
      launch("router_topk_bwd", router_topk_bwd_kernel<T, of_lane()>, ceil_div(num_tokens, kPlaceThreads / kWarp),
             kPlaceThreads, stream, pointer<const float>(grad_weights), pointer<const float>(grad_scores),
             pointer<const float>(grad_gates), pointer<const float>(scores), pointer<const int>(topk_ids),
             pointer<const int>(token_rows), pointer<T>(grad_logits), static_cast<int>(num_tokens), num_experts, top_k,
             softmax, normalize, scale);
    });
  });
}

}  // namespace diffmoe
