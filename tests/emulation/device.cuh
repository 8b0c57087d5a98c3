// CUDA's execution model on a CPU, for the kernels of csrc/cuda compiled as C++: put this folder before csrc/cuda on
// the include path. launch() runs the blocks of a grid one after another, each thread of a block as a fiber of its own:
//
//   threadIdx, blockIdx, blockDim, gridDim       what the running fiber is
//   __syncthreads, __syncwarp, shuffles, votes   a fiber waits there until all threads of its block or warp have come
//   shared<T>()                                  new memory for each block, of the size asked for, all bits set
//   atomics                                      the compiler's
//
// Threads that part ways at a barrier, or end while others wait, stop the program with a message. ThreadSanitizer knows
// the fibers as threads, of which only barriers, atomics and the launch order accesses: it finds a race between any two
// threads of a block, or of neighbouring blocks, whatever the order in which they happen to run here. AddressSanitizer
// finds accesses beyond shared and global memory.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define EMULATION_TSAN 1
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
#define EMULATION_TSAN 0
#endif

struct alignas(16) double2 {
  double x, y;
};

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define EMULATION_UNSEEN __attribute__((noinline, no_sanitize("thread")))

using std::fma;
using std::max;
using std::min;

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 << 10, kMostShared = 99 << 10;  // what the smallest has
constexpr unsigned kNoSync = 1;                              // of __tsan_switch_to_fiber: switching orders nothing

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class State { ready, at_barrier, in_warp, done };

// Pushes the registers that a function must keep, saves the stack pointer, and goes on where another one was saved.
// (The C library's swapcontext takes a system call each time, which is most of the time then.)
#if defined(__x86_64__)
constexpr int kSaved = 6;
__attribute__((naked, noinline)) inline void switch_stack(void** /* save */, void* /* load */) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#else
#error "the emulation knows how to switch stacks on x86-64 only"
#endif

struct Fiber {
  void* stack_pointer;
  void *tsan, *tsan_before;  // and that of the same thread of the block before
  State state;
};

// The block that is running.
struct Machine {
  Fiber fibers[kMostThreads];
  char* stacks = nullptr;
  void *scheduler = nullptr, *scheduler_tsan = nullptr, *shared = nullptr;
  int threads = 0, current = 0;
  unsigned block = 0, blocks = 0;
  uint64_t slots[kMostThreads];               // of shuffles and votes
  double fragments[kMostThreads][16];         // of products by a warp: 8 numbers of each operand
  char start, end;                            // what ThreadSanitizer orders by: the host's launch and its end,
  char barrier, warps[kMostThreads / kWarp];  // and the barriers
  const std::function<void()>* body = nullptr;
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u)\n", what, machine.block);
  std::abort();
}

inline void acquire([[maybe_unused]] void* address) {
#if EMULATION_TSAN
  __tsan_acquire(address);
#endif
}
inline void release([[maybe_unused]] void* address) {
#if EMULATION_TSAN
  __tsan_release(address);
#endif
}

EMULATION_UNSEEN inline void switch_to_scheduler(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
#if EMULATION_TSAN
  __tsan_switch_to_fiber(machine.scheduler_tsan, kNoSync);
#endif
  switch_stack(&fiber.stack_pointer, machine.scheduler);
}

EMULATION_UNSEEN inline void switch_to_fiber(int index) {
  machine.current = index;
#if EMULATION_TSAN
  __tsan_switch_to_fiber(machine.fibers[index].tsan, kNoSync);
#endif
  switch_stack(&machine.scheduler, machine.fibers[index].stack_pointer);
}

EMULATION_UNSEEN inline void run_fiber() {
  acquire(&machine.start);
  (*machine.body)();
  release(&machine.end);
  switch_to_scheduler(State::done);
}

// If all of the threads [begin, end) wait in `state`, lets them go on.
EMULATION_UNSEEN inline bool meet(int begin, int end, State state) {
  for (int i = begin; i < end; ++i)
    if (machine.fibers[i].state != state) return false;
  for (int i = begin; i < end; ++i) machine.fibers[i].state = State::ready;
  return true;
}

EMULATION_UNSEEN inline void run_block(unsigned block) {
  machine.block = block;
  if (EMULATION_TSAN || machine.stacks == nullptr)  // to ThreadSanitizer mapped memory is new: stacks are not shared
    machine.stacks = static_cast<char*>(mmap(machine.stacks, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | (machine.stacks ? MAP_FIXED : 0), -1, 0));
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    void** top = reinterpret_cast<void**>(machine.stacks + (i + 1) * kStack) -
                 2;  // a function begins 8 bytes past a multiple of 16
    *top = reinterpret_cast<void*>(run_fiber);
    fiber.stack_pointer = top - kSaved;
    fiber.state = State::ready;
#if EMULATION_TSAN
    fiber.tsan_before = block > 0 ? fiber.tsan : nullptr;
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < machine.threads; ++i)
      if (machine.fibers[i].state == State::ready) {
        switch_to_fiber(i);
        moved = true;
      }
    for (int warp = 0; warp < machine.threads; warp += kWarp)
      if (meet(warp, warp + kWarp, State::in_warp)) moved = true;
    if (!moved) moved = meet(0, machine.threads, State::at_barrier);
  }
  for (int i = 0; i < machine.threads; ++i) {
    if (machine.fibers[i].state == State::at_barrier) fail("__syncthreads() was not reached by all threads");
    if (machine.fibers[i].state == State::in_warp) fail("a warp's threads parted ways at a shuffle, vote or barrier");
#if EMULATION_TSAN  // not before the next block has run, lest that have the same identity
    if (machine.fibers[i].tsan_before != nullptr) __tsan_destroy_fiber(machine.fibers[i].tsan_before);
    if (block + 1 == machine.blocks) __tsan_destroy_fiber(machine.fibers[i].tsan);
#endif
  }
}

// Runs the grid, at once.
EMULATION_UNSEEN inline void run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (blocks < 0 || blocks > INT32_MAX || threads < 1 || threads > kMostThreads || threads % kWarp ||
      shared_bytes > kMostShared)
    fail("a launch that CUDA would refuse");
  machine.threads = threads;
  machine.blocks = static_cast<unsigned>(blocks);
  machine.body = &body;
#if EMULATION_TSAN
  machine.scheduler_tsan = __tsan_get_current_fiber();
#endif
  std::vector<void*> memories;  // each block's is new, so that no two of them seem to share it
  for (int64_t block = 0; block < blocks; ++block) {
    machine.shared = std::malloc(shared_bytes);
    std::memset(machine.shared, 0xff, shared_bytes);
    memories.push_back(machine.shared);
    release(&machine.start);
    run_block(static_cast<unsigned>(block));
    if (!EMULATION_TSAN || block + 1 == blocks) {
      acquire(&machine.end);
      for (void* memory : memories) std::free(memory);
      memories.clear();
    }
  }
}

EMULATION_UNSEEN inline Index thread_index() { return {static_cast<unsigned>(machine.current)}; }
EMULATION_UNSEEN inline Index block_index() { return {machine.block}; }
EMULATION_UNSEEN inline Index block_size() { return {static_cast<unsigned>(machine.threads)}; }
EMULATION_UNSEEN inline Index grid_size() { return {machine.blocks}; }

EMULATION_UNSEEN inline void block_barrier() {
  release(&machine.barrier);
  switch_to_scheduler(State::at_barrier);
  acquire(&machine.barrier);
}

EMULATION_UNSEEN inline void warp_barrier() {
  char* order = &machine.warps[machine.current / kWarp];
  release(order);
  switch_to_scheduler(State::in_warp);
  acquire(order);
}

// What the lanes of a warp give, seen by all of them. Orders no memory, as on the GPU.
template <typename T, typename F>
EMULATION_UNSEEN auto exchange(T value, const F& read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int first = machine.current / kWarp * kWarp;
  std::memcpy(&machine.slots[machine.current], &value, sizeof value);
  switch_to_scheduler(State::in_warp);
  const auto result = read([&](int lane) EMULATION_UNSEEN {
    T other;
    __builtin_memcpy(&other, &machine.slots[first + lane], sizeof other);
    return other;
  });
  switch_to_scheduler(State::in_warp);
  return result;
}

// See csrc/cuda/device.cuh.
EMULATION_UNSEEN inline void tensor_multiply_add(double (&sums)[2][4][4], const double (&a)[2][4],
                                                 const double (&b)[4][2]) {
  double (*all)[16] = machine.fragments + machine.current / kWarp * kWarp;
  const int lane = machine.current % kWarp;
  __builtin_memcpy(all[lane], a, sizeof a);
  __builtin_memcpy(all[lane] + 8, b, sizeof b);
  switch_to_scheduler(State::in_warp);
  for (int p = 0; p < 2; ++p)
    for (int q = 0; q < 4; ++q)
      for (int g = 0; g < 2; ++g)
        for (int v = 0; v < 2; ++v) {
          double sum = sums[p][q][2 * g + v];
          for (int k = 0; k < 8; ++k)
            sum += all[lane / 4 * 4 + k % 4][4 * p + k / 4 * 2 + g] *
                   all[(lane % 4 * 2 + v) * 4 + k % 4][8 + 2 * q + k / 4];
          sums[p][q][2 * g + v] = sum;
        }
  switch_to_scheduler(State::in_warp);
}

inline int lane() { return static_cast<int>(thread_index().x) % kWarp; }

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("only whole warps may exchange values here");
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  emulation::check_mask(mask);
  return emulation::exchange(value, [&](const auto& of) { return of(source % emulation::kWarp); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, emulation::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = emulation::lane();
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulation::check_mask(mask);
  return emulation::exchange(vote, [](const auto& of) {
    unsigned votes = 0;
    for (int lane = 0; lane < emulation::kWarp; ++lane) votes |= static_cast<unsigned>(of(lane)) << lane;
    return votes;
  });
}

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMin(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

namespace mfac::cuda {

using emulation::tensor_multiply_add;

template <typename T>
T& shared() {
  return *static_cast<T*>(emulation::machine.shared);
}

inline int64_t temporaries_limit() { return 512 << 10; }  // so that small problems have several tiles and chunks
inline int64_t shared_limit() { return emulation::kMostShared; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const void* /* stream */,
            Arguments... arguments) {
  emulation::run(blocks, threads, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace mfac::cuda
