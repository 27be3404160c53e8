// Runs CUDA kernels on a CPU, to test their logic: blocks one after another, a block's threads as fibers that pass the
// processor on where they wait for each other. A barrier that some threads never reach, or a warp that meets different
// calls, raises. The order of threads and blocks can be shuffled: with a barrier missing, results then differ.
// Included before all else where sources are compiled as C++20.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
// One block at a time, so that static storage is the block's; a thread's, which is one piece that can be poisoned.
#define __shared__ static thread_local

using std::max, std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class State { kReady, kAtBlockBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  unsigned mask;     // of the warp call that it waits in
  const char* call;  // its name
  uint64_t value;    // what it brings there
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int current = 0;
  int threads = 0;
  std::function<void()> kernel;
  std::exception_ptr error;
  std::vector<uint64_t> met;  // by thread, what it brought to its warp's last call
};

inline Block block;
inline std::vector<std::string> launched;
inline int order_seed = 0;

// Of warps, each as far as it gets without the others, of a warp's threads and of blocks: 0 in order, -1 backwards,
// else shuffled by it.
inline void set_thread_order(int seed) { order_seed = seed; }

inline std::vector<int> order_of(int count, int salt) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed < 0) std::reverse(order.begin(), order.end());
  if (order_seed > 0) {
    std::mt19937 generator(order_seed * 7919 + salt);
    std::shuffle(order.begin(), order.end(), generator);
  }
  return order;
}

inline Fiber& self() { return block.fibers[block.current]; }

inline void wait(State state) {
  self().state = state;
  swapcontext(&self().context, &block.scheduler);
}

inline void enter() {
  try {
    block.kernel();
  } catch (...) {
    block.error = std::current_exception();
  }
  self().state = State::kDone;
  swapcontext(&self().context, &block.scheduler);
}

// Lets those threads of a warp go on whose call all of its mask have reached; true where any may.
inline bool release_warp(int begin, int end) {
  bool any = false;
  for (int thread = begin; thread < end; ++thread) {
    Fiber& first = block.fibers[thread];
    if (first.state != State::kInWarp) continue;
    const std::string call = first.call;
    bool all = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(first.mask >> lane & 1)) continue;
      if (begin + lane >= end) throw std::logic_error(call + ": its mask names lanes that are not there");
      const Fiber& other = block.fibers[begin + lane];
      if (other.state == State::kDone) throw std::logic_error(call + ": a lane of its mask has ended");
      if (other.state != State::kInWarp) {
        all = false;
      } else if (other.mask != first.mask || call != other.call) {
        throw std::logic_error(call + ": a lane of its mask is in " + other.call);
      }
    }
    if (!all) continue;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(first.mask >> lane & 1)) continue;
      Fiber& other = block.fibers[begin + lane];
      block.met[begin + lane] = other.value;
      other.state = State::kReady;
    }
    any = true;
  }
  return any;
}

// Runs a warp as far as it gets without other warps.
inline void run_warp(int begin, int end, const std::vector<int>& order) {
  do {
    for (const int lane : order) {
      const int thread = begin + lane;
      while (thread < end && block.fibers[thread].state == State::kReady) {
        block.current = thread;
        threadIdx.x = thread;
        swapcontext(&block.scheduler, &block.fibers[thread].context);
        if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
      }
    }
  } while (release_warp(begin, end));
}

inline void run_block(int index, int threads) {
  blockIdx.x = index;
  const auto begin = block.fibers.begin(), end = begin + threads;
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = block.fibers[thread];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
  }
  const int warps = (threads + kWarp - 1) / kWarp;
  const std::vector<int> order = order_of(warps, index), lanes = order_of(kWarp, index);
  for (;;) {
    for (const int warp : order) run_warp(warp * kWarp, std::min((warp + 1) * kWarp, threads), lanes);
    if (std::all_of(begin, end, [](const Fiber& fiber) { return fiber.state == State::kDone; })) return;
    if (std::any_of(begin, end, [](const Fiber& fiber) { return fiber.state == State::kInWarp; })) {
      throw std::logic_error("a warp's threads wait for others of it that are at a barrier of the block");
    }
    // CUDA lets those that have ended be absent; in these kernels that would be a mistake.
    if (std::any_of(begin, end, [](const Fiber& fiber) { return fiber.state == State::kDone; })) {
      throw std::logic_error("some threads wait at a barrier of the block, others have ended");
    }
    for (Fiber& fiber : block.fibers) {
      if (fiber.state == State::kAtBlockBarrier) fiber.state = State::kReady;
    }
  }
}

// The names of the kernels launched since it was asked last.
inline std::vector<std::string> take_launched() { return std::exchange(launched, {}); }

// All thread-local storage of this library: the blocks' shared memory, and some of pybind11's, which is put back.
class SharedMemory {
 public:
  SharedMemory() {
    dl_iterate_phdr(find, this);
    if (begin_ == nullptr) throw std::logic_error("the library's thread-local storage is not found");
    kept_.assign(begin_, begin_ + size_);
  }
  ~SharedMemory() { std::copy(kept_.begin(), kept_.end(), begin_); }
  void poison() { std::memset(begin_, 0xa5, size_); }

 private:
  static int find(dl_phdr_info* library, size_t, void* self) {
    const auto here = reinterpret_cast<ElfW(Addr)>(&find);
    bool is_this = false;
    size_t size = 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = library->dlpi_phdr[i];
      const ElfW(Addr) start = library->dlpi_addr + part.p_vaddr;
      if (part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz) is_this = true;
      if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (!is_this || library->dlpi_tls_data == nullptr) return 0;
    static_cast<SharedMemory*>(self)->begin_ = static_cast<char*>(library->dlpi_tls_data);
    static_cast<SharedMemory*>(self)->size_ = size;
    return 1;
  }

  char* begin_ = nullptr;
  size_t size_ = 0;
  std::vector<char> kept_;
};

// Takes launches in the place of what follows, if set: where in this library the kernel is, the grid, threads of a
// block, and the arguments' bytes.
using Runner = std::function<void(uint64_t, int64_t, int, std::vector<uint64_t>)>;
inline Runner runner;
inline void set_runner(Runner instead) { runner = std::move(instead); }

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

inline uint64_t place_in_library(void* function) {
  Dl_info library;
  if (dladdr(function, &library) == 0) throw std::logic_error("a kernel is in no library");
  return reinterpret_cast<uint64_t>(function) - reinterpret_cast<uint64_t>(library.dli_fbase);
}

template <class... Parameters>
void run(const char* name, void (*kernel)(Parameters...), int64_t grid, int threads, Parameters... arguments) {
  launched.emplace_back(name);
  if (runner) {
    runner(place_in_library(reinterpret_cast<void*>(kernel)), grid, threads, {bits_of(arguments)...});
    return;
  }
  block.kernel = [=] { kernel(arguments...); };
  block.threads = threads;
  block.met.assign(threads, 0);
  if (static_cast<int>(block.fibers.size()) < threads) block.fibers = std::vector<Fiber>(threads);
  blockDim.x = threads;
  gridDim.x = grid;
  SharedMemory shared;
  for (const int index : order_of(grid, -1)) {
    shared.poison();
    run_block(index, threads);
  }
}

// Meets the lanes of the mask; returns what each of the warp's 32 brought.
template <class T>
const uint64_t* meet(const char* call, unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (!(mask >> (block.current % kWarp) & 1))
    throw std::logic_error(std::string(call) + ": the caller is not in its mask");
  Fiber& fiber = self();
  fiber.value = 0;
  std::memcpy(&fiber.value, &value, sizeof(T));
  fiber.mask = mask;
  fiber.call = call;
  const int warp = block.current / kWarp * kWarp;
  wait(State::kInWarp);
  return &block.met[warp];
}

template <class T>
T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::wait(on_cpu::State::kAtBlockBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { on_cpu::meet("__syncwarp", mask, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return on_cpu::as<T>(on_cpu::meet("__shfl_sync", mask, value)[lane % 32]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const int own = threadIdx.x % 32;
  return on_cpu::as<T>(on_cpu::meet("__shfl_xor_sync", mask, value)[own ^ lanes]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned own = threadIdx.x % 32;
  return on_cpu::as<T>(on_cpu::meet("__shfl_up_sync", mask, value)[own < lanes ? own : own - lanes]);
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
  const uint64_t* votes = on_cpu::meet("__ballot_sync", mask, holds);
  unsigned found = 0;
  for (int lane = 0; lane < 32; ++lane) found |= (mask >> lane & 1 && votes[lane]) ? 1u << lane : 0u;
  return found;
}
inline bool __any_sync(unsigned mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
template <class T, class Combine>
T reduce_on_cpu(const char* call, unsigned mask, T value, Combine combine) {
  const uint64_t* values = on_cpu::meet(call, mask, value);
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) value = combine(value, on_cpu::as<T>(values[lane]));
  }
  return value;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduce_on_cpu("__reduce_max_sync", mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return reduce_on_cpu("__reduce_min_sync", mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}

template <class T>
T atomicAdd(T* place, T value) {
  const T old = *place;
  *place = old + value;
  return old;
}
template <class T>
T atomicOr(T* place, T value) {
  const T old = *place;
  *place = old | value;
  return old;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline int __clz(unsigned bits) { return std::countl_zero(bits); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
template <class T>
T __ldg(const T* place) {
  return *place;
}

using __half = _Float16;
inline __half __ushort_as_half(uint16_t bits) { return std::bit_cast<__half>(bits); }
inline uint16_t __half_as_ushort(__half value) { return std::bit_cast<uint16_t>(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
struct __nv_bfloat16 {
  uint16_t bits;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
