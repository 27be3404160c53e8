// Capacity-based dynamic token dropping: expert choice in two launches.
// T tokens in P pools of S, E experts, R rows, B chunks of a pool's tokens. A segment is one expert's scores in one
// pool. Its cut: keys above it are chosen, and of those equal to it the first few, its ties, in token order.
//
// 1. token_drop_cut_kernel: a block finds a segment's cut digit by digit, and counts the chosen in each of its chunks.
// 2. token_drop_place_kernel: a block sums the counts of the chunks before its own, and ranks its tokens by bits.
#include "common.cuh"
#include "ops.h"
#include "select.cuh"

namespace diffmoe {
namespace {

constexpr int kMaxExperts = 256;
constexpr int kHeld = 16;  // keys that a thread of token_drop_cut_kernel keeps in registers
constexpr int kPlaceThreads = 256;
constexpr int kPlaceBlocks = 5;  // on a multiprocessor; for six ptxas would spill
constexpr int kWords = kPlaceThreads / kWarp;
constexpr int kMaxChunks = 256;  // of a pool: each block of token_drop_place_kernel reads the counts of those before

template <class T>
__device__ bool passes(T logit, float threshold) {
  return 1.0f / (1.0f + expf(-to_float(logit))) > threshold;
}

// scores (T, E), logits (T, E) and thresholds (E,), or neither -> cuts, ties (P, E), wanted (E,) where predicted,
// counts (P, B, E): in each chunk how many keys are above the cut, and 65536 times how many are equal to it
template <class S, class L>
__global__ void __launch_bounds__(kCutThreads)
    token_drop_cut_kernel(const S* __restrict__ scores, const L* __restrict__ logits,
                          const float* __restrict__ thresholds, unsigned* __restrict__ cuts, int* __restrict__ ties,
                          int* __restrict__ wanted_out, unsigned* __restrict__ counts, int pool_size, int num_experts,
                          int capacity, int chunk, int num_chunks, bool by_token) {
  __shared__ int histogram[kDigits];
  __shared__ int parts[kCutThreads / kWarp];
  __shared__ int found[2];
  __shared__ unsigned chunk_counts[kMaxChunks];
  const int pool = blockIdx.x / num_experts, expert = blockIdx.x % num_experts;
  const int64_t first = static_cast<int64_t>(pool) * pool_size * num_experts + expert;
  const bool predicted = logits != nullptr;
  const float threshold = predicted ? thresholds[expert] : 0.0f;
  const bool fits = pool_size <= kCutThreads * kHeld;

  const auto load = [&](int token) {
    const int64_t at = first + static_cast<int64_t>(token) * num_experts;
    if (by_token && !passes(logits[at], threshold)) return kNotThere;
    return key_of(to_float(scores[at]));
  };
  unsigned held[kHeld];
  if (fits) {
    // All are read before the first is looked at: behind branches each load would wait for the one before.
    const auto place = [&](int i) { return static_cast<int>(threadIdx.x) + i * kCutThreads; };
    const auto at = [&](int i) { return first + static_cast<int64_t>(min(place(i), pool_size - 1)) * num_experts; };
    unsigned is_there = 0;  // a bit a key
    if (by_token) {
      L own[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) own[i] = logits[at(i)];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) is_there |= static_cast<unsigned>(passes(own[i], threshold)) << i;
    } else {
      is_there = ~0u;
    }
    S own[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) own[i] = scores[at(i)];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = place(i) < pool_size && (is_there >> i & 1) ? key_of(to_float(own[i])) : kNotThere;
    }
  }
  const auto for_each_key = [&](auto function) {
    if (fits) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (static_cast<int>(threadIdx.x) + i * kCutThreads < pool_size) function(held[i]);
      }
    } else {
      for (int token = threadIdx.x; token < pool_size; token += kCutThreads) function(load(token));
    }
  };

  int wanted = capacity;
  if (predicted) {
    int passed = 0;
    for (int token = threadIdx.x; token < pool_size; token += kCutThreads) {
      passed += passes(logits[first + static_cast<int64_t>(token) * num_experts], threshold);
    }
    passed = block_sum(passed, parts);
    if (threadIdx.x == 0) wanted_out[expert] = passed;
    wanted = min(passed, capacity);
  }
  unsigned cut = 0xffffffffu;  // with no ties: none is chosen
  int equals = 0;
  if (wanted > 0) {
    equals = wanted;
    cut = radix_select(for_each_key, &equals, histogram, parts, found);
  }
  if (threadIdx.x == 0) {
    cuts[blockIdx.x] = cut;
    ties[blockIdx.x] = equals;
  }

  for (int one = threadIdx.x; one < num_chunks; one += kCutThreads) chunk_counts[one] = 0;
  __syncthreads();
  int token = threadIdx.x;
  for_each_key([&](unsigned key) {
    if (key > cut) atomicAdd(&chunk_counts[token / chunk], 1u);
    if (key == cut) atomicAdd(&chunk_counts[token / chunk], 65536u);
    token += kCutThreads;
  });
  __syncthreads();
  for (int one = threadIdx.x; one < num_chunks; one += kCutThreads) {
    counts[(static_cast<int64_t>(pool) * num_chunks + one) * num_experts + expert] = chunk_counts[one];
  }
}

// scores (T, E), logits (T, E) and thresholds (E,), or neither, cuts, ties (P, E), wanted (E,), counts (P, B, E)
// -> gates (R,), token_indices (R,), group_offsets (E,), token_offsets (T + 1,), token_rows (R,), num_dropped ()
template <class S, class L>
__global__ void __launch_bounds__(kPlaceThreads, kPlaceBlocks)
    token_drop_place_kernel(const S* __restrict__ scores, const L* __restrict__ logits,
                            const float* __restrict__ thresholds, const unsigned* __restrict__ cuts,
                            const int* __restrict__ ties, const int* __restrict__ wanted,
                            const unsigned* __restrict__ counts, float* __restrict__ gates,
                            int* __restrict__ token_indices, int* __restrict__ group_offsets,
                            int* __restrict__ token_offsets, int* __restrict__ token_rows,
                            int64_t* __restrict__ num_dropped, int num_pools, int pool_size, int num_experts,
                            int capacity, int chunk, int num_chunks, int64_t num_rows, bool by_token) {
  __shared__ int starts[kMaxExperts];                       // of the pool's rows
  __shared__ int aboves[kMaxExperts], equals[kMaxExperts];  // of the pool's tokens so far
  __shared__ unsigned cut_of[kMaxExperts];
  __shared__ int ties_of[kMaxExperts];
  __shared__ unsigned above_bits[kWords][kMaxExperts], equal_bits[kWords][kMaxExperts];
  __shared__ int parts[kWords];
  __shared__ int total_rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int pool = blockIdx.x / num_chunks, own_chunk = blockIdx.x % num_chunks;
  const bool predicted = logits != nullptr;

  for (int expert = threadIdx.x; expert < num_experts; expert += kPlaceThreads) {
    aboves[expert] = equals[expert] = 0;
    cut_of[expert] = cuts[pool * num_experts + expert];
    ties_of[expert] = ties[pool * num_experts + expert];
  }
  __syncthreads();
  for (int expert = lane; expert < num_experts; expert += kWarp) {
    int above = 0, equal = 0;
#pragma unroll 4
    for (int other = warp; other < own_chunk; other += kWords) {
      const unsigned count = counts[(static_cast<int64_t>(pool) * num_chunks + other) * num_experts + expert];
      above += count & 0xffff;
      equal += count >> 16;
    }
    atomicAdd(&aboves[expert], above);
    atomicAdd(&equals[expert], equal);
  }
  const auto size_of = [&](int expert) { return predicted ? min(wanted[expert], capacity) : capacity * num_pools; };
  int64_t dropped = 0;
  if (warp == 0) {
    int rows = 0;
    for (int base = 0; base < num_experts; base += kWarp) {
      const int expert = base + lane;
      const int own = expert < num_experts ? size_of(expert) : 0;
      int sum = warp_running_sum(own);
      if (expert < num_experts) {
        starts[expert] = rows + sum - own + pool * capacity;
        if (blockIdx.x == 0) group_offsets[expert] = rows + sum;
        if (predicted) dropped += wanted[expert] - own;
      }
      rows += __shfl_sync(kWholeWarp, sum, kWarp - 1);
    }
    if (lane == 0) total_rows = rows;
    if (predicted && blockIdx.x == 0) {
      dropped = warp_sum(dropped);
      if (lane == 0) *num_dropped = dropped;
    }
  }
  __syncthreads();
  int before = 0;  // of this thread's experts
  for (int expert = threadIdx.x; expert < num_experts; expert += kPlaceThreads) {
    before += aboves[expert] + min(equals[expert], ties_of[expert]);
  }
  int slot = block_sum(before, parts) + pool * capacity * num_experts;  // the chunk's first
  if (blockIdx.x == 0 && threadIdx.x == 0) token_offsets[static_cast<int64_t>(num_pools) * pool_size] = total_rows;

  const int end = min((own_chunk + 1) * chunk, pool_size);
  for (int begin = own_chunk * chunk; begin < end; begin += kPlaceThreads) {
    const int place = begin + threadIdx.x;
    const int64_t token = static_cast<int64_t>(pool) * pool_size + place;
    for (int expert = 0; expert < num_experts; ++expert) {
      unsigned key = kNotThere;
      if (place < end) {
        const int64_t at = token * num_experts + expert;
        if (!by_token || passes(logits[at], thresholds[expert])) key = key_of(to_float(scores[at]));
      }
      const unsigned above = __ballot_sync(kWholeWarp, key > cut_of[expert]);
      const unsigned equal = __ballot_sync(kWholeWarp, place < end && key == cut_of[expert]);
      if (lane == 0) {
        above_bits[warp][expert] = above;
        equal_bits[warp][expert] = equal;
      }
    }
    __syncthreads();
    const unsigned earlier = (1u << lane) - 1;
    // The row of this thread's token in an expert's, or -1.
    const auto row_of = [&](int expert) {
      const bool is_above = above_bits[warp][expert] >> lane & 1, is_equal = equal_bits[warp][expert] >> lane & 1;
      if (!is_above && !is_equal) return -1;
      int above = aboves[expert] + __popc(above_bits[warp][expert] & earlier);
      int equal = equals[expert] + __popc(equal_bits[warp][expert] & earlier);
      for (int word = 0; word < warp; ++word) {
        above += __popc(above_bits[word][expert]);
        equal += __popc(equal_bits[word][expert]);
      }
      if (!is_above && equal >= ties_of[expert]) return -1;
      return starts[expert] + above + min(equal, ties_of[expert]);
    };
    int own = 0;
    for (int expert = 0; expert < num_experts; ++expert) own += row_of(expert) >= 0;
    int sum = warp_running_sum(own);
    if (lane == kWarp - 1) parts[warp] = sum;
    __syncthreads();
    int next = slot + sum - own;
    for (int other = 0; other < kWords; ++other) {
      if (other < warp) next += parts[other];
      slot += parts[other];
    }
    if (place < end) {
      token_offsets[token] = next;
      for (int expert = 0; expert < num_experts; ++expert) {
        const int row = row_of(expert);
        if (row < 0) continue;
        token_rows[next++] = row;
        token_indices[row] = static_cast<int>(token);
        gates[row] = to_float(scores[token * num_experts + expert]);
      }
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < num_experts; expert += kPlaceThreads) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        aboves[expert] += __popc(above_bits[word][expert]);
        equals[expert] += __popc(equal_bits[word][expert]);
      }
    }
    __syncthreads();
  }
  if (predicted) {  // zeros past the true count
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kPlaceThreads;
    for (int64_t row = total_rows + static_cast<int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x; row < num_rows;
         row += stride) {
      token_indices[row] = 0;
      gates[row] = 0.0f;
      token_rows[row] = 0;
    }
  }
}

// grad_gates (R,), group_offsets (E,), token_offsets (T + 1,), token_rows (R,) -> grad_scores (T, E)
template <class T>
__global__ void __launch_bounds__(kPlaceThreads)
    token_drop_bwd_kernel(const float* __restrict__ grad_gates, const int* __restrict__ group_offsets,
                          const int* __restrict__ token_offsets, const int* __restrict__ token_rows,
                          T* __restrict__ grad_scores, int64_t num_scores, int num_experts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (at >= num_scores) return;
  const int64_t token = at / num_experts;
  const int expert = static_cast<int>(at - token * num_experts);
  const int begin = expert ? group_offsets[expert - 1] : 0, end = group_offsets[expert];
  float grad = 0.0f;
  for (int slot = token_offsets[token]; slot < token_offsets[token + 1]; ++slot) {
    const int row = token_rows[slot];
    if (begin <= row && row < end) grad = grad_gates[row];
  }
  grad_scores[at] = from_float<T>(grad);
}

// Calls function(S{}, L{}) with the types of scores and of what is predicted.
template <class Function>
void with_types(int scores_type, int logits_type, Function function) {
  with_type(scores_type, [&](auto score) { with_type(logits_type, [&](auto logit) { function(score, logit); }); });
}

int chunk_of(int64_t pool_size) {
  return static_cast<int>(ceil_div(ceil_div(pool_size, kMaxChunks), kPlaceThreads) * kPlaceThreads);
}

}  // namespace

int token_drop_chunks(int64_t pool_size) {
  constexpr int64_t kMost = 65280 * kMaxChunks;  // a chunk's counts have 16 bits each
  if (pool_size < 1 || pool_size > kMost) {
    throw std::invalid_argument("pool_size: expected 1 to " + std::to_string(kMost) + ", got " +
                                std::to_string(pool_size));
  }
  return static_cast<int>(ceil_div(pool_size, chunk_of(pool_size)));
}

void token_drop_fwd(Pointer scores, Pointer logits, Pointer thresholds, Pointer cuts, Pointer ties, Pointer wanted,
                    Pointer counts, Pointer gates, Pointer token_indices, Pointer group_offsets, Pointer token_offsets,
                    Pointer token_rows, Pointer num_dropped, int num_pools, int64_t pool_size, int num_experts,
                    int capacity, int64_t num_rows, int scores_type, int logits_type, bool by_token, Stream stream) {
  const int num_chunks = token_drop_chunks(pool_size), chunk = chunk_of(pool_size);
  if (num_experts > kMaxExperts) {
    throw std::invalid_argument("num_experts: expected at most 256, got " + std::to_string(num_experts));
  }
  with_types(scores_type, logits_type, [&](auto score, auto logit) {
    using S = decltype(score);
    using L = decltype(logit);
    launch("token_drop_cut", token_drop_cut_kernel<S, L>, static_cast<int64_t>(num_pools) * num_experts, kCutThreads,
           stream, pointer<const S>(scores), pointer<const L>(logits), pointer<const float>(thresholds),
           pointer<unsigned>(cuts), pointer<int>(ties), pointer<int>(wanted), pointer<unsigned>(counts),
           static_cast<int>(pool_size), num_experts, capacity, chunk, num_chunks, by_token);
    launch("token_drop_place", token_drop_place_kernel<S, L>, static_cast<int64_t>(num_pools) * num_chunks,
           kPlaceThreads, stream, pointer<const S>(scores), pointer<const L>(logits), pointer<const float>(thresholds),
           pointer<const unsigned>(cuts), pointer<const int>(ties), pointer<const int>(wanted),
           pointer<const unsigned>(counts), pointer<float>(gates), pointer<int>(token_indices),
           pointer<int>(group_offsets), pointer<int>(token_offsets), pointer<int>(token_rows),
           pointer<int64_t>(num_dropped), num_pools, static_cast<int>(pool_size), num_experts, capacity, chunk,
           num_chunks, num_rows, by_token);
  });
}

void token_drop_bwd(Pointer grad_gates, Pointer group_offsets, Pointer token_offsets, Pointer token_rows,
                    Pointer grad_scores, int64_t num_tokens, int num_experts, int type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch("token_drop_bwd", token_drop_bwd_kernel<T>, ceil_div(num_tokens * num_experts, kPlaceThreads), kPlaceThreads,
           stream, pointer<const float>(grad_gates), pointer<const int>(group_offsets),
           pointer<const int>(token_offsets), pointer<const int>(token_rows), pointer<T>(grad_scores),
           num_tokens * num_experts, num_experts);
  });
}

}  // namespace diffmoe
