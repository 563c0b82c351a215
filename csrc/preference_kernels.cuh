// The loss head's kernels for any device: the errors and what follows from them, the gradient. A
// block takes a part of a pair, both halves at once, so every input is read once. Atomics only count
// blocks: the order of every sum is fixed. No torch header: tests/cuda_on_cpu compiles this for the
// CPU.
#pragma once

#include "elements.cuh"
#include "preference.h"

namespace dde_fast {

struct Inputs {
  Rows policy, reference, target;  // reference unread where the kernel takes none
  int64_t pairs, n;
};

// one element's share of a half's sums of (o-y)², (o_ref-y)² and their difference; returns o - y
template <class A, bool REFERENCE>
__device__ __forceinline__ A add_element(A o, A r, A y, A* sums) {
  const A e = o - y;
  sums[0] += e * e;
  if (REFERENCE) {
    const A f = r - y;
    sums[1] += f * f;
    sums[2] += (o - r) * (e + f);
  }
  return e;
}

// VECTOR elements of both halves, 16 bytes at a time; errors: their o - y
template <class A, class P, class Y, bool REFERENCE>
__device__ __forceinline__ void add_pack(const Inputs& a, int64_t pair, int64_t at, A (&sums)[2][3],
                                         A (&errors)[2][VECTOR]) {
  Pack<P> o[2], r[2];
  Pack<Y> y[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // a shared row's second load comes from the cache
    const int64_t sample = pair + half * a.pairs;
    o[half] = load_pack<P>(a.policy.data, row_of(a.policy, sample) * a.n + at);
    y[half] = load_pack<Y>(a.target.data, row_of(a.target, sample) * a.n + at);
    if (REFERENCE) r[half] = load_pack<P>(a.reference.data, row_of(a.reference, sample) * a.n + at);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const A b_o = widened<A>(o[half].elements[i]), b_y = widened<A>(y[half].elements[i]);
      const A b_r = REFERENCE ? widened<A>(r[half].elements[i]) : b_o;
      errors[half][i] = add_element<A, REFERENCE>(b_o, b_r, b_y, sums[half]);
    }
  }
}

// the six sums of each warp, for the block to add after a barrier
template <class A>
__device__ __forceinline__ void sum_by_warp(const A (&sums)[2][3], A (&by_warp)[6][WARPS]) {
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    const A sum = warp_sum(sums[i / 3][i % 3]);
    if (threadIdx.x % 32 == 0) by_warp[i][threadIdx.x / 32] = sum;
  }
}

// From a pair's sums to everything that the forward returns.
struct Finish {
  Schedule schedule;
  Objective objective;
  Column errors;  // cached, [2B]; data null: none
  bool has_prediction;
  void *loss, *logits, *policy_error, *reference_error, *margin;
  int64_t pairs, n;
};

// The logit of a pair from its sums [half][of add_element]; `write`: its places of the outputs too.
template <class A>
__device__ A finish_pair(const Finish& a, int64_t pair, const double (&sums)[2][3], bool write) {
  const double n = static_cast<double>(a.n);
  double d[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = pair + half * a.pairs;
    const double e = sums[half][0] / n;
    double e_reference = 0;
    d[half] = e;
    if (a.has_prediction) {
      e_reference = sums[half][1] / n;
      d[half] = sums[half][2] / n;
    } else if (a.errors.data) {
      e_reference = static_cast<A>(element(a.errors, row));
      d[half] = e - e_reference;
    }
    if (!write) continue;
    static_cast<A*>(a.policy_error)[row] = static_cast<A>(e);
    if (a.has_prediction || a.errors.data) {
      static_cast<A*>(a.reference_error)[row] = static_cast<A>(e_reference);
    }
  }
  const A logit =
      static_cast<A>(logit_of(a.schedule, a.objective, pair, a.pairs, d[0], d[1]));
  if (write) {
    static_cast<A*>(a.logits)[pair] = logit;
    const int64_t t = timestep_of(a.schedule, pair);
    static_cast<A*>(a.margin)[pair] = static_cast<A>(element(a.schedule.margins, t));
  }
  return logit;
}

// The mean of all pairs' losses, by one block; `by_warp` is in shared memory.
template <class A>
__device__ void store_mean_loss(const Finish& a, double* by_warp) {
  // volatile: other blocks may have written them in this launch
  const volatile A* logits = static_cast<const A*>(a.logits);
  // about the first pair's loss: exact when all are equal, so log 2 stays log 2
  const double first = link_loss(static_cast<double>(logits[0]), a.objective);
  double sum = 0;
  for (int64_t pair = threadIdx.x; pair < a.pairs; pair += THREADS) {
    sum += link_loss(static_cast<double>(logits[pair]), a.objective) - first;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += by_warp[warp];
  *static_cast<A*>(a.loss) = static_cast<A>(first + sum / static_cast<double>(a.pairs));
}

// Counts the blocks or clusters of one launch, in memory that nobody has to set to zero: the launch's own
// nonce plus 0 … all - 1 is a count, any other value is none yet. So is the full count that stays
// behind, when a CUDA graph launches again with the same nonce.
struct Ticket {
  unsigned long long* count;
  unsigned long long nonce;
};

// True for the last of `callers`; what the others wrote before calling is visible to it.
__device__ __forceinline__ bool is_last(const Ticket& ticket, int64_t callers) {
  if (callers == 1) return true;
  const unsigned long long all = static_cast<unsigned long long>(callers);
  unsigned long long seen = *static_cast<volatile unsigned long long*>(ticket.count), before;
  __threadfence();
  unsigned long long count;
  do {
    before = seen;
    count = 1 + (before - ticket.nonce < all ? before - ticket.nonce : 0);
    seen = atomicCAS(ticket.count, before, ticket.nonce + count);
  } while (seen != before);
  __threadfence();
  return count == all;
}

// Blocks of a multiprocessor that nvcc makes room for; 0: its own choice, which spilled in fp64.
template <class A>
constexpr int ROOM = sizeof(A) == sizeof(double) ? 1 : 0;

struct Errors {
  Inputs inputs;
  void* partial;  // [3, 2B, chunks]: the sums of add_element
  int64_t chunk, chunks;
  Finish finish;
  Ticket tickets;  // [1 + B]: of the pairs, then of each pair's chunks
};

// the block's sums of both halves, into this chunk's places
template <class A>
__device__ void store_partial(const Errors& a, const A (&sums)[2][3], int64_t pair,
                              int64_t i_chunk) {
  __shared__ A by_warp[6][WARPS];
  sum_by_warp(sums, by_warp);
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= 6) return;
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += by_warp[i][warp];
  const int64_t row = i % 3 * 2 * a.inputs.pairs + i / 3 * a.inputs.pairs + pair;
  static_cast<A*>(a.partial)[row * a.chunks + i_chunk] = sum;
}

// The last block of a pair adds up its chunks, in their order; that of the last pair, all losses.
template <class A>
__device__ void finish_where_last(const Errors& a, int64_t pair) {
  __shared__ double sums[2][3], by_warp[WARPS];
  __shared__ bool last;
  __syncthreads();  // the block's sums are in their places
  if (threadIdx.x == 0) {
    last = is_last({a.tickets.count + 1 + pair, a.tickets.nonce}, a.chunks);
  }
  __syncthreads();
  if (!last) return;
  const int i = static_cast<int>(threadIdx.x) / 32;
  if (i < 6) {  // a warp for each sum
    const int64_t row = i % 3 * 2 * a.inputs.pairs + i / 3 * a.inputs.pairs + pair;
    // volatile: other blocks have written them in this launch
    const volatile A* parts = static_cast<const A*>(a.partial) + row * a.chunks;
    double sum = 0;
    for (int64_t part = threadIdx.x % 32; part < a.chunks; part += 32) {
      sum += static_cast<double>(parts[part]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[i / 3][i % 3] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    finish_pair<A>(a.finish, pair, sums, true);
    last = is_last(a.tickets, a.inputs.pairs);
  }
  __syncthreads();
  if (last) store_mean_loss<A>(a.finish, by_warp);
}

// 16 bytes at a time: N a multiple of VECTOR, aligned rows, reference in policy's dtype
template <class A, class P, class Y, bool REFERENCE>
__global__ void __launch_bounds__(THREADS, ROOM<A>) errors_kernel(Errors a) {
  const int64_t pair = blockIdx.x / a.chunks, i_chunk = blockIdx.x % a.chunks;
  const int64_t start = i_chunk * a.chunk, n = a.inputs.n;
  const int64_t stop = start + a.chunk < n ? start + a.chunk : n;
  A sums[2][3] = {};
  for (int64_t at = start + threadIdx.x * VECTOR; at < stop; at += TILE) {
    A errors[2][VECTOR];
    add_pack<A, P, Y, REFERENCE>(a.inputs, pair, at, sums, errors);
  }
  store_partial(a, sums, pair, i_chunk);
  finish_where_last<A>(a, pair);
}

// any N, alignment and mix of dtypes
template <class A, bool REFERENCE>
__global__ void __launch_bounds__(THREADS, ROOM<A>) errors_any_kernel(Errors a) {
  const Rows &policy = a.inputs.policy, &reference = a.inputs.reference, &target = a.inputs.target;
  const int64_t pair = blockIdx.x / a.chunks, i_chunk = blockIdx.x % a.chunks;
  const int64_t start = i_chunk * a.chunk, n = a.inputs.n;
  const int64_t stop = start + a.chunk < n ? start + a.chunk : n;
  A sums[2][3] = {};
  for (int64_t at = start + threadIdx.x; at < stop; at += THREADS) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t sample = pair + half * a.inputs.pairs;
      const A o = load_any<A>(policy, row_of(policy, sample) * n + at);
      const A y = load_any<A>(target, row_of(target, sample) * n + at);
      const A r = REFERENCE ? load_any<A>(reference, row_of(reference, sample) * n + at) : o;
      add_element<A, REFERENCE>(o, r, y, sums[half]);
    }
  }
  store_partial(a, sums, pair, i_chunk);
  finish_where_last<A>(a, pair);
}

template <class A>
struct Gradient {
  Rows policy, target;
  void* gradient;  // rows and dtype of policy
  Schedule schedule;
  Objective objective;
  bool has_loss;  // a gradient of the loss arrives
  const A *grad_loss, *grad_logits, *grad_policy_error;  // null: 1, 0 and 0
  const A* logits;
  int64_t pairs, n, tiles;
};

template <class A>
__device__ __forceinline__ A factor_of(const Gradient<A>& a, int64_t pair, int half) {
  const int64_t row = pair + half * a.pairs;
  const Incoming<A> incoming{a.grad_loss ? *a.grad_loss : A(1),
                             a.grad_logits ? a.grad_logits[pair] : A(0),
                             a.grad_policy_error ? a.grad_policy_error[row] : A(0), a.has_loss};
  return gradient_factor(a.schedule, a.objective, incoming, a.logits[pair], pair, half, a.pairs,
                         a.n);
}

// VECTOR elements of both halves of the gradient; a shared prediction gets their sum
template <class P, class A>
__device__ __forceinline__ void store_gradient(void* gradient, bool shared, int64_t pair,
                                               int64_t pairs, int64_t n, int64_t at,
                                               const A (&errors)[2][VECTOR],
                                               const A (&factors)[2]) {
  Pack<P> out[2];
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const A winner = errors[0][i] * factors[0], loser = errors[1][i] * factors[1];
    out[0].elements[i] = narrowed<P>(shared ? winner + loser : winner);
    out[1].elements[i] = narrowed<P>(loser);
  }
  store_pack(gradient, pair * n + at, out[0]);
  if (!shared) store_pack(gradient, (pair + pairs) * n + at, out[1]);
}

// 16 bytes at a time: N a multiple of VECTOR, aligned rows
template <class A, class P, class Y>
__global__ void __launch_bounds__(THREADS) gradient_kernel(Gradient<A> a) {
  const int64_t pair = blockIdx.x / a.tiles;
  const int64_t at = blockIdx.x % a.tiles * TILE + threadIdx.x * VECTOR;
  if (at >= a.n) return;
  Pack<P> o[2];
  Pack<Y> y[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t sample = pair + half * a.pairs;
    o[half] = load_pack<P>(a.policy.data, row_of(a.policy, sample) * a.n + at);
    y[half] = load_pack<Y>(a.target.data, row_of(a.target, sample) * a.n + at);
  }
  const A factors[2] = {factor_of(a, pair, 0), factor_of(a, pair, 1)};
  A errors[2][VECTOR];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      errors[half][i] = widened<A>(o[half].elements[i]) - widened<A>(y[half].elements[i]);
    }
  }
  store_gradient<P>(a.gradient, a.policy.rows == a.pairs, pair, a.pairs, a.n, at, errors, factors);
}

// any N, alignment and mix of dtypes
template <class A>
__global__ void __launch_bounds__(THREADS) gradient_any_kernel(Gradient<A> a) {
  const int64_t pair = blockIdx.x / a.tiles;
  const int64_t start = blockIdx.x % a.tiles * TILE + threadIdx.x;
  const bool shared = a.policy.rows == a.pairs;
  const A factors[2] = {factor_of(a, pair, 0), factor_of(a, pair, 1)};
  for (int i = 0; i < VECTOR; ++i) {
    const int64_t at = start + i * THREADS;
    if (at >= a.n) return;
    A g[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t sample = pair + half * a.pairs;
      const A o = load_any<A>(a.policy, row_of(a.policy, sample) * a.n + at);
      const A y = load_any<A>(a.target, row_of(a.target, sample) * a.n + at);
      g[half] = (o - y) * factors[half];
    }
    store_any(a.gradient, a.policy.dtype, pair * a.n + at, shared ? g[0] + g[1] : g[0]);
    if (!shared) store_any(a.gradient, a.policy.dtype, (pair + a.pairs) * a.n + at, g[1]);
  }
}

// A gradient times a number that only the device knows, in place; where that is 1, nothing is read.
// E of any address; A is what the product is formed in.
template <class E, class A>
__global__ void __launch_bounds__(THREADS) scale_kernel(E* data, int64_t n, Column factor) {
  const A by = static_cast<A>(element(factor, 0));
  if (by == A(1)) return;
  // elements before the first aligned one, and after the last whole vector
  const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16);
  const int64_t to_aligned = off ? (16 - off) / static_cast<int64_t>(sizeof(E)) : 0;
  const int64_t head = to_aligned < n ? to_aligned : n;
  const int64_t packs = (n - head) / VECTOR, tail = (n - head) % VECTOR;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  for (int64_t i = first; i < packs; i += static_cast<int64_t>(gridDim.x) * THREADS) {
    const int64_t at = head + i * VECTOR;
    const Pack<E> given = load_pack<E, false>(data, at);
    Pack<E> out;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) out.elements[j] = narrowed<E>(widened<A>(given.elements[j]) * by);
    store_pack(data, at, out);
  }
  if (first >= head + tail) return;
  const int64_t at = first < head ? first : n - tail + (first - head);
  data[at] = narrowed<E>(widened<A>(data[at]) * by);
}

}  // namespace dde_fast
