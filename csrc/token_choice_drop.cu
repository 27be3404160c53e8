// The bound on an expert's tokens in token choice, in one launch. R slots, E experts.
#include "common.cuh"
#include "ops.h"
#include "select.cuh"

namespace diffmoe {
namespace {

// ids (R,), scores (R,) -> kept (R,), a copy of the ids: -1 in those past an expert's best, num_dropped (E,)
template <class I, class S>
__global__ void __launch_bounds__(kCutThreads)
    drop_choices_kernel(const I* __restrict__ ids, const S* __restrict__ scores, I* __restrict__ kept,
                        int64_t* __restrict__ num_dropped, int64_t num_slots, int capacity) {
  __shared__ int histogram[kDigits];
  __shared__ int parts[kCutThreads / kWarp];
  __shared__ int found[2];
  const int expert = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto for_each_key = [&](auto function) {
    for (int64_t slot = threadIdx.x; slot < num_slots; slot += kCutThreads) {
      if (ids[slot] == expert) function(key_of(to_float(scores[slot])));
    }
  };
  int size = 0;
  for_each_key([&](unsigned) { ++size; });
  size = block_sum(size, parts);
  if (threadIdx.x == 0) num_dropped[expert] = max(size - capacity, 0);
  if (size <= capacity) return;
  int ties = capacity;
  unsigned cut = 0xffffffffu;
  if (capacity > 0) cut = radix_select(for_each_key, &ties, histogram, parts, found);
  int before = 0;  // keys equal to the cut in earlier slots
  for (int64_t base = 0; base < num_slots; base += kCutThreads) {
    const int64_t slot = base + threadIdx.x;
    const bool mine = slot < num_slots && ids[slot] == expert;
    const unsigned key = mine ? key_of(to_float(scores[slot])) : kNotThere;
    const bool is_equal = mine && key == cut;
    const unsigned bits = __ballot_sync(kWholeWarp, is_equal);
    if (lane == 0) parts[warp] = __popc(bits);
    __syncthreads();
    int rank = before + __popc(bits & ((1u << lane) - 1));
    for (int other = 0; other < kCutThreads / kWarp; ++other) {
      if (other < warp) rank += parts[other];
      before += parts[other];
    }
    if (mine && (key < cut || (is_equal && rank >= ties))) kept[slot] = -1;
    __syncthreads();
  }
}

}  // namespace

void drop_choices(Pointer ids, Pointer scores, Pointer kept, Pointer num_dropped, int64_t num_slots, int num_experts,
                  int64_t capacity, bool wide_ids, int type, Stream stream) {
  const int most = static_cast<int>(std::min(capacity, num_slots));
  with_type(type, [&](auto zero) {
    using S = decltype(zero);
    const auto go = [&](auto id) {
      using I = decltype(id);
      launch("drop_choices", drop_choices_kernel<I, S>, num_experts, kCutThreads, stream, pointer<const I>(ids),
             pointer<const S>(scores), pointer<I>(kept), pointer<int64_t>(num_dropped), num_slots, most);
    };
    if (wide_ids) {
      go(int64_t{});
    } else {
      go(int{});
    }
  });
}

}  // namespace diffmoe
