// Enough of CUDA for a C++ compiler to take the kernels of csrc and run them on the CPU: to test
// their indices and barriers without a GPU. A block is an OS thread and its threads are fibers in
// it, taken in turn from barrier to barrier, so __shared__ is thread_local. A block of a cluster
// runs until it has to wait for another one; the clusters run one after another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

constexpr size_t STACK = 64 << 10;
constexpr int64_t PATIENCE = 1 << 20;  // turns after which a barrier counts as never complete

struct Barrier {
  int arrived = 0, turn = 0;
};

struct Cluster {
  int blocks, threads;
  bool backwards;  // the order of turns: what lacks a barrier differs between the two
  std::vector<std::span<char>> shared;  // dynamic shared memory by rank
  Barrier barrier;
  int ended = 0;
  std::mutex running;  // held by the block that runs
};

struct Fiber {
  ucontext_t context;  // where it starts; from then on by jumps, which cost no system call
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool started = false, ended = false;
  int cluster_turn = 0;
};

struct Warp {
  Barrier barrier;
  int live = 32;
  unsigned char slots[32][8];
};

struct Block {
  Cluster* cluster;
  unsigned rank;
  jmp_buf main;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int live, current;
  bool progress;
  std::function<void()> kernel;
};

struct Index {
  unsigned x;
};
inline thread_local Index thread_index, block_index, grid_size;
inline thread_local Block* block;

inline void yield() {
  if (!_setjmp(block->fibers[block->current].jump)) _longjmp(block->main, 1);
}

// lets the current fiber run up to its next yield, or its end
inline void resume(Block& b) {
  Fiber& fiber = b.fibers[b.current];
  if (fiber.ended || _setjmp(b.main)) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline int arrive(Barrier& barrier, int members) {
  const int turn = barrier.turn;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.turn;
  }
  return turn;
}

inline void wait(Barrier& barrier, int turn) {
  for (int64_t i = 0; barrier.turn == turn; ++i) {
    if (i == PATIENCE) {
      std::fprintf(stderr, "a barrier that not all threads reach\n");
      std::abort();
    }
    yield();
  }
  block->progress = true;
}

// a thread that is gone is waited for no more
inline void leave(Barrier& barrier, int members) {
  if (members && barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.turn;
  }
}

inline void fiber_main() {
  Block& b = *block;
  const int me = b.current;
  b.kernel();
  b.fibers[me].ended = b.progress = true;
  leave(b.barrier, --b.live);
  Warp& warp = b.warps[me / 32];
  leave(warp.barrier, --warp.live);
  _longjmp(b.main, 1);
}

inline void run_block(Cluster& cluster, unsigned index, const std::function<void()>& kernel) {
  Block b{&cluster, index % cluster.blocks, {}, std::vector<Fiber>(cluster.threads),
          std::vector<Warp>(cluster.threads / 32), {}, cluster.threads, 0, false, kernel};
  block = &b;
  block_index.x = index;
  for (Fiber& fiber : b.fibers) {
    getcontext(&fiber.context);
    fiber.stack.reset(new char[STACK]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::unique_lock lock(cluster.running);
  const auto let_others_run = [&] {
    lock.unlock();
    std::this_thread::yield();
    lock.lock();
  };
  while (b.live) {
    b.progress = false;
    for (int i = 0; i < cluster.threads; ++i) {
      b.current = cluster.backwards ? cluster.threads - 1 - i : i;
      thread_index.x = static_cast<unsigned>(b.current);
      resume(b);
    }
    if (!b.progress) let_others_run();
  }
  // whoever reads the memory of a block that is gone is to notice
  std::memset(cluster.shared[b.rank].data(), 0xFF, cluster.shared[b.rank].size());
  ++cluster.ended;
  while (cluster.ended < cluster.blocks) let_others_run();
}

// Runs kernel() for every thread; `dynamic` gives a block's dynamic shared memory.
template <class Dynamic, class Kernel>
void launch(unsigned clusters, int blocks, int threads, bool backwards, Dynamic dynamic,
            Kernel kernel) {
  for (unsigned i = 0; i < clusters; ++i) {
    Cluster cluster{blocks, threads, backwards, std::vector<std::span<char>>(blocks)};
    std::vector<std::thread> running;
    const unsigned first = (backwards ? clusters - 1 - i : i) * blocks;
    for (int rank = 0; rank < blocks; ++rank) {
      running.emplace_back([&, rank] {
        cluster.shared[rank] = dynamic();
        grid_size.x = clusters * blocks;
        run_block(cluster, first + rank, kernel);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size

inline void __syncthreads() {
  emulator::Barrier& barrier = emulator::block->barrier;
  emulator::wait(barrier, emulator::arrive(barrier, emulator::block->live));
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int offset) {
  const int me = emulator::block->current;
  emulator::Warp& warp = emulator::block->warps[me / 32];
  std::memcpy(warp.slots[me % 32], &x, sizeof(T));
  emulator::wait(warp.barrier, emulator::arrive(warp.barrier, warp.live));
  std::memcpy(&x, warp.slots[me % 32 ^ offset], sizeof(T));
  emulator::wait(warp.barrier, emulator::arrive(warp.barrier, warp.live));
  return x;
}

inline uint4 __ldg(const uint4* data) { return *data; }
inline uint4 __ldcg(const uint4* data) { return *data; }
inline void __stwb(uint4* data, uint4 x) { *data = x; }
inline void __threadfence() {}

inline unsigned long long atomicCAS(unsigned long long* data, unsigned long long expected,
                                    unsigned long long x) {
  const unsigned long long before = *data;
  if (before == expected) *data = x;
  return before;
}
