// The loss head's CUDA kernels as a library for tests/test_cuda_on_cpu.py, which fills in a Case.

#include "cuda_runtime.h"

namespace dde_fast {

constexpr size_t MOST_SHARED = 227 << 10;  // of a block on sm_90

thread_local float4 dynamic[MOST_SHARED / sizeof(float4)];  // the kernels' extern __shared__

}  // namespace dde_fast

#include "preference_cluster.cuh"

namespace dde_fast {
namespace {

struct Case {
  Rows policy, reference, target;
  Schedule schedule;
  Objective objective;
  Column errors;
  void *gradient, *loss, *logits, *policy_error, *reference_error, *margin, *partial;
  unsigned long long* count;  // [1 + pairs]
  int64_t pairs, n, chunk;
  unsigned blocks;                // of a cluster; 0: as many as the op takes
  bool wide, backwards, aligned;  // aligned: vector kernels where there are some
};

// NaN or zeros: whoever reads before a write gets two results from the two orders
auto dynamic_memory(const Case& c) {
  return [&c] {
    std::memset(dynamic, c.backwards ? 0 : 0xFF, sizeof(dynamic));
    return std::span(reinterpret_cast<char*>(dynamic), sizeof(dynamic));
  };
}

Finish finish_of(const Case& c) {
  return {c.schedule, c.objective,       c.errors, c.reference.data != nullptr, c.loss, c.logits,
          c.policy_error, c.reference_error, c.margin, c.pairs, c.n};
}

template <class Kernel>
void launch(const Case& c, int64_t blocks, Kernel kernel) {
  emulator::launch(static_cast<unsigned>(blocks), 1, THREADS, c.backwards, dynamic_memory(c),
                   kernel);
}

template <class A, bool REFERENCE>
void forward(const Case& c, unsigned long long nonce) {
  const int64_t chunks = (c.n + c.chunk - 1) / c.chunk, blocks = c.pairs * chunks;
  const Errors a{{c.policy, c.reference, c.target, c.pairs, c.n}, c.partial, c.chunk, chunks,
                 finish_of(c), {c.count, nonce}};
  const bool done = vectorised(
      c.policy.dtype, c.target.dtype, c.n, c.aligned, [&](auto acc, auto policy, auto target) {
        using P = decltype(policy);
        using Y = decltype(target);
        launch(c, blocks, [&] { errors_kernel<decltype(acc), P, Y, REFERENCE>(a); });
      });
  if (!done) launch(c, blocks, [&] { errors_any_kernel<A, REFERENCE>(a); });
}

template <class A>
void backward(const Case& c) {
  const int64_t tiles = (c.n + TILE - 1) / TILE;
  const Gradient<A> a{c.policy, c.target, c.gradient, c.schedule, c.objective,
                      true, nullptr, nullptr, nullptr, static_cast<const A*>(c.logits),
                      c.pairs, c.n, tiles};
  const bool done = vectorised(
      c.policy.dtype, c.target.dtype, c.n, c.aligned, [&](auto acc, auto policy, auto target) {
        if constexpr (sizeof(A) == sizeof(acc)) {
          using P = decltype(policy);
          using Y = decltype(target);
          launch(c, c.pairs * tiles, [&] { gradient_kernel<A, P, Y>(a); });
        }
      });
  if (!done) launch(c, c.pairs * tiles, [&] { gradient_any_kernel<A>(a); });
}

template <class P, class Y, bool REFERENCE>
void pairs(const Case& c, unsigned long long nonce) {
  const unsigned blocks = c.blocks ? c.blocks : cluster_blocks(c.n, MOST_SHARED);
  const PairLoss a{{c.policy, c.reference, c.target, c.pairs, c.n}, c.gradient, finish_of(c),
                   {c.count, nonce}, share_of(c.n, blocks), blocks};
  if (shared_bytes(a.share) > static_cast<int64_t>(MOST_SHARED)) std::abort();
  emulator::launch(static_cast<unsigned>(c.pairs), static_cast<int>(blocks), THREADS, c.backwards,
                   dynamic_memory(c), [&] { pair_kernel<P, Y, REFERENCE>(a); });
}

}  // namespace

// the kernels of the ops for any device: errors with all that follows from them, gradient
extern "C" void run_two(const Case* c, unsigned long long nonce) {
  const bool has = c->reference.data;
  if (c->wide) {
    has ? forward<double, true>(*c, nonce) : forward<double, false>(*c, nonce);
    backward<double>(*c);
  } else {
    has ? forward<float, true>(*c, nonce) : forward<float, false>(*c, nonce);
    backward<float>(*c);
  }
}

// a gradient of n elements scaled in place
extern "C" void run_scale(void* data, int dtype, int64_t n, Column factor, unsigned blocks) {
  const auto run = [&](auto* x, auto acc) {
    emulator::launch(
        blocks, 1, THREADS, false,
        [] { return std::span(reinterpret_cast<char*>(dynamic), sizeof(dynamic)); },
        [&] { scale_kernel<std::remove_pointer_t<decltype(x)>, decltype(acc)>(x, n, factor); });
  };
  if (dtype == F64) return run(static_cast<double*>(data), 0.0);
  if (dtype == F32) return run(static_cast<float*>(data), 0.0f);
  if (dtype == F16) return run(static_cast<__half*>(data), 0.0f);
  run(static_cast<__nv_bfloat16*>(data), 0.0f);
}

// the kernel for clusters
extern "C" void run_pairs(const Case* c, unsigned long long nonce) {
  vectorised(c->policy.dtype, c->target.dtype, c->n, true, [&](auto acc, auto policy, auto target) {
    if constexpr (sizeof(acc) == sizeof(float)) {
      using P = decltype(policy);
      using Y = decltype(target);
      c->reference.data ? pairs<P, Y, true>(*c, nonce) : pairs<P, Y, false>(*c, nonce);
    }
  });
}

}  // namespace dde_fast
