// Loss and gradient in one launch (sm_90 and later): a cluster of blocks takes a pair, keeps o - y
// of its elements in shared memory while the cluster adds up the errors, and writes the gradient
// from there, so each input crosses the memory bus once. No torch header: tests/cuda_on_cpu
// compiles this for the CPU.
#pragma once

#include <cooperative_groups.h>

#include "preference_kernels.cuh"

namespace dde_fast {

constexpr unsigned PORTABLE_CLUSTER = 8;  // blocks that every device with clusters has
constexpr unsigned MAX_CLUSTER = 16;      // where a device allows it: for latents of 16 channels

struct PairLoss {
  Inputs inputs;
  void* gradient;  // rows and dtype of policy
  Finish finish;
  Ticket ticket;
  int64_t share;    // elements of a row for each block, a multiple of VECTOR
  unsigned blocks;  // of a cluster
};

// A block's shared memory, in front of o - y of its share of both halves.
struct alignas(16) Shared {
  double sums[6];  // the block's, read by the whole cluster
  double pair_sums[2][3];
  double losses[WARPS];
  float by_warp[6][WARPS];
  float factors[2];
  bool last;
};

extern __shared__ float4 dynamic[];  // a Shared and what is behind it

inline int64_t shared_bytes(int64_t share) {
  return static_cast<int64_t>(sizeof(Shared)) + 2 * share * static_cast<int64_t>(sizeof(float));
}

inline int64_t share_of(int64_t n, unsigned blocks) {
  const int64_t step = int64_t{blocks} * VECTOR;
  return (n + step - 1) / step * VECTOR;
}

// A pair is split until each block has one tile, as its loads are then all on their way at once, and
// further only if it does not fit into `most` bytes a block.
inline unsigned cluster_blocks(int64_t n, int64_t most) {
  unsigned blocks = 1;
  while (blocks < PORTABLE_CLUSTER && n > int64_t{blocks} * TILE) blocks *= 2;
  return shared_bytes(share_of(n, blocks)) <= most ? blocks : MAX_CLUSTER;
}

// Where one thread keeps pack `i` of a block's `packs`: neighbours in neighbouring 16 bytes.
__device__ __forceinline__ float4* kept(Shared* shared, int64_t packs, int half, int part,
                                        int64_t i) {
  return reinterpret_cast<float4*>(shared + 1) + (2 * half + part) * packs + i;
}

__device__ __forceinline__ void keep(Shared* shared, int64_t packs, int64_t i,
                                     const float (&errors)[2][VECTOR]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float(&e)[VECTOR] = errors[half];
    *kept(shared, packs, half, 0, i) = make_float4(e[0], e[1], e[2], e[3]);
    *kept(shared, packs, half, 1, i) = make_float4(e[4], e[5], e[6], e[7]);
  }
}

__device__ __forceinline__ void recall(Shared* shared, int64_t packs, int64_t i,
                                       float (&errors)[2][VECTOR]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 low = *kept(shared, packs, half, 0, i), high = *kept(shared, packs, half, 1, i);
    float(&e)[VECTOR] = errors[half];
    e[0] = low.x, e[1] = low.y, e[2] = low.z, e[3] = low.w;
    e[4] = high.x, e[5] = high.y, e[6] = high.z, e[7] = high.w;
  }
}

// The threads below 6 add the block's warps.
__device__ __forceinline__ void sum_block(const float (&sums)[2][3], Shared* shared) {
  sum_by_warp(sums, shared->by_warp);
  __syncthreads();
  if (threadIdx.x >= 6) return;
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) {
    sum += static_cast<double>(shared->by_warp[threadIdx.x][warp]);
  }
  shared->sums[threadIdx.x] = sum;
}

__device__ __forceinline__ void prefetch(const void* data) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
#endif
}

// The cluster waits for its logit, so what that takes from the tables is sent for beforehand.
__device__ __forceinline__ void prefetch_terms(const Schedule& schedule, int64_t pair) {
  const int64_t t = timestep_of(schedule, pair);
  for (const Column* x : {&schedule.weights, &schedule.margins}) {
    prefetch(static_cast<const char*>(x->data) + t * (x->wide ? 8 : 4));
  }
}

// N a multiple of VECTOR, aligned rows, reference in policy's dtype; a.blocks blocks to a cluster.
// Asked for 4 blocks a multiprocessor, nvcc uses 64 registers; unasked it spilled some on sm_100.
template <class P, class Y, bool REFERENCE>
__global__ void __launch_bounds__(THREADS, 4) pair_kernel(PairLoss a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Shared* shared = reinterpret_cast<Shared*>(dynamic);
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const int64_t pair = blockIdx.x / a.blocks, rank = blockIdx.x % a.blocks;
  const int64_t start = rank * a.share, packs = a.share / VECTOR, n = a.inputs.n;
  const int64_t stop = start + a.share < n ? start + a.share : n;
  if (threadIdx.x == 0) prefetch(a.finish.schedule.timesteps + pair);
  float sums[2][3] = {}, errors[2][VECTOR];
  for (int64_t i = threadIdx.x, at = start + i * VECTOR; at < stop; i += THREADS, at += TILE) {
    add_pack<float, P, Y, REFERENCE>(a.inputs, pair, at, sums, errors);
    keep(shared, packs, i, errors);
  }
  sum_block(sums, shared);
  if (threadIdx.x == 32) prefetch_terms(a.finish.schedule, pair);  // warp 0 is adding
  cluster.sync();
  if (threadIdx.x < 6) {  // every block in the same order, so all get the same bits
    double sum = 0;
    for (unsigned i = 0; i < a.blocks; ++i) {
      sum += cluster.map_shared_rank(shared, static_cast<int>(i))->sums[threadIdx.x];
    }
    shared->pair_sums[threadIdx.x / 3][threadIdx.x % 3] = sum;
  }
  cluster.barrier_arrive();  // this block reads no other's memory from here on
  __syncthreads();
  if (threadIdx.x == 0) {
    const float logit = finish_pair<float>(a.finish, pair, shared->pair_sums, rank == 0);
    const Incoming<float> incoming{1, 0, 0, true};
    for (int half = 0; half < 2; ++half) {
      shared->factors[half] = gradient_factor(a.finish.schedule, a.finish.objective, incoming,
                                              logit, pair, half, a.finish.pairs, n);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) shared->last = rank == 0 && is_last(a.ticket, a.finish.pairs);
  const float factors[2] = {shared->factors[0], shared->factors[1]};
  const bool one = a.inputs.policy.rows == a.inputs.pairs;
  for (int64_t i = threadIdx.x, at = start + i * VECTOR; at < stop; i += THREADS, at += TILE) {
    recall(shared, packs, i, errors);  // what this thread itself kept
    store_gradient<P>(a.gradient, one, pair, a.inputs.pairs, n, at, errors, factors);
  }
  __syncthreads();
  if (shared->last) store_mean_loss<float>(a.finish, shared->losses);
  cluster.barrier_wait();  // before exiting: the others may still read this block's sums
#else
  __trap();  // never launched there
#endif
}

}  // namespace dde_fast
