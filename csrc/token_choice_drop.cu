// The bound on an expert's tokens in token choice, in one launch. R slots, E experts.
#include "common.cuh"
#include "ops.h"
#include "select.cuh"

namespace diffmoe {
namespace {

constexpr int kHeld = 10240;  // slots of one expert in shared memory; of more, all are read again
constexpr int kInFlight = 4;  // vectors of ids that a thread reads at once

// ids (R,), scores (R,) -> kept (R,), a copy of the ids: -1 in those past an expert's best, num_dropped (E,)
template <class I, int N, class S>
__global__ void __launch_bounds__(kCutThreads, 1)
    token_choice_drop_kernel(const I* __restrict__ ids, const S* __restrict__ scores, I* __restrict__ kept,
                             int64_t* __restrict__ num_dropped, int num_slots, int capacity) {
  __shared__ int histogram[kDigits];
  __shared__ int parts[kCutThreads / kWarp];
  __shared__ int found[2];
  __shared__ int held[kHeld];  // the expert's slots, in any order
  __shared__ int size;
  const int expert = blockIdx.x, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) size = 0;
  __syncthreads();
  // Each lane of a warp brings slots of the expert, a bit each.
  const auto hold = [&](unsigned own, auto slot_of) {
    if (!__any_sync(kWholeWarp, own != 0)) return;
    const int sum = warp_running_sum(__popc(own));
    int first = 0;
    if (lane == kWarp - 1) first = atomicAdd(&size, sum);
    int at = __shfl_sync(kWholeWarp, first, kWarp - 1) + sum - __popc(own);
    for (; own != 0; own &= own - 1, ++at) {
      if (at < kHeld) held[at] = slot_of(__ffs(own) - 1);
    }
  };
  const unsigned vectors = num_slots / N;
  for (unsigned base = threadIdx.x; base - threadIdx.x < vectors; base += kCutThreads * kInFlight) {
    Vec<I, N> some[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      some[i] = reinterpret_cast<const Vec<I, N>*>(ids)[min(base + i * kCutThreads, vectors - 1)];
    }
    unsigned own = 0;
#pragma unroll
    for (int bit = 0; bit < kInFlight * N; ++bit) {
      const bool is_own = base + bit / N * kCutThreads < vectors && some[bit / N].values[bit % N] == expert;
      own |= static_cast<unsigned>(is_own) << bit;
    }
    hold(own, [&](int bit) { return static_cast<int>((base + bit / N * kCutThreads) * N + bit % N); });
  }
  const unsigned tail_slot = vectors * N + threadIdx.x;  // fewer than a vector has
  hold(tail_slot < static_cast<unsigned>(num_slots) && ids[tail_slot] == expert,
       [&](int) { return static_cast<int>(tail_slot); });
  __syncthreads();
  if (threadIdx.x == 0) num_dropped[expert] = max(size - capacity, 0);
  if (size <= capacity) return;
  const auto for_each_slot = [&](auto function) {
    if (size <= kHeld) {
      for (int i = threadIdx.x; i < size; i += kCutThreads) function(held[i]);
    } else {
      for (int64_t slot = threadIdx.x; slot < num_slots; slot += kCutThreads) {
        if (ids[slot] == expert) function(static_cast<int>(slot));
      }
    }
  };
  const auto key_at = [&](int slot) { return key_of(to_float(scores[slot])); };
  unsigned cut = 0xffffffffu;
  int last = -1;  // slot that is kept of those equal to the cut
  if (capacity > 0) {
    int ties = capacity;
    const auto keys = [&](auto function) { for_each_slot([&](int slot) { function(key_at(slot)); }); };
    cut = radix_select(keys, &ties, histogram, parts, found);
    const auto equals = [&](auto function) {
      for_each_slot([&](int slot) {
        if (key_at(slot) == cut) function(~static_cast<unsigned>(slot));
      });
    };
    last = static_cast<int>(~radix_select(equals, &ties, histogram, parts, found));
  }
  for_each_slot([&](int slot) {
    const unsigned key = key_at(slot);
    if (key < cut || (key == cut && slot > last)) kept[slot] = -1;
  });
}

}  // namespace

void token_choice_drop_fwd(Pointer ids, Pointer scores, Pointer kept, Pointer num_dropped, int64_t num_slots,
                           int num_experts, int64_t capacity, bool wide_ids, int type, Stream stream) {
  if (num_slots > INT32_MAX) {
    throw std::invalid_argument("num_slots: expected at most 2^31 - 1, got " + std::to_string(num_slots));
  }
  const int most = static_cast<int>(std::min(capacity, num_slots));
  with_type(type, [&](auto zero) {
    using S = decltype(zero);
    const auto go = [&](auto id, auto numbers) {
      using I = decltype(id);
      launch("token_choice_drop", token_choice_drop_kernel<I, numbers(), S>, num_experts, kCutThreads, stream,
             pointer<const I>(ids), pointer<const S>(scores), pointer<I>(kept), pointer<int64_t>(num_dropped),
             static_cast<int>(num_slots), most);
    };
    const auto with_ids = [&](auto id) {
      if (ids % 16 == 0) {
        go(id, std::integral_constant<int, 16 / sizeof(id)>{});
      } else {
        go(id, std::integral_constant<int, 1>{});
      }
    };
    if (wide_ids) {
      with_ids(int64_t{});
    } else {
      with_ids(int{});
    }
  });
}

}  // namespace diffmoe
