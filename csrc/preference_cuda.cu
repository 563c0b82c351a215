// The loss head on CUDA (sm_80 and later): two launches forward, one backward. A block takes a part
// of a pair, both halves at once, so every input is read once. No atomics: the order of every sum is
// fixed. Nothing waits for the host, and memory comes from torch, so a CUDA graph can capture it.

#include "cuda.cuh"

namespace dde_fast {
namespace {

constexpr int64_t MAX_CHUNKS = 64;  // partial sums of a row

struct Errors {
  Rows policy, reference, target;
  void* partial;  // [3, 2B, chunks]: sums of (y-o)², (y-o_ref)² and their difference
  int64_t pairs, n, chunk, chunks;
};

// one element's share of a half's three sums
template <class A, bool REFERENCE>
__device__ __forceinline__ void add_element(A o, A r, A y, A* sums) {
  const A e = y - o;
  sums[0] += e * e;
  if (REFERENCE) {
    const A f = y - r;
    sums[1] += f * f;
    sums[2] += (r - o) * (e + f);
  }
}

// the block's sums of both halves, into this chunk's places
template <class A>
__device__ void store_partial(const Errors& a, A (&sums)[2][3], int64_t pair, int64_t i_chunk) {
  __shared__ A by_warp[6][WARPS];
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    const A sum = warp_sum(sums[i / 3][i % 3]);
    if (threadIdx.x % 32 == 0) by_warp[i][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= 6) return;
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += by_warp[i][warp];
  const int64_t row = i % 3 * 2 * a.pairs + i / 3 * a.pairs + pair;
  static_cast<A*>(a.partial)[row * a.chunks + i_chunk] = sum;
}

// 16 bytes at a time: N a multiple of VECTOR, aligned rows, reference in policy's dtype
template <class A, class P, class Y, bool REFERENCE>
__global__ void __launch_bounds__(THREADS) errors_kernel(Errors a) {
  const int64_t pair = blockIdx.x / a.chunks, i_chunk = blockIdx.x % a.chunks;
  const int64_t start = i_chunk * a.chunk;
  const int64_t stop = start + a.chunk < a.n ? start + a.chunk : a.n;
  A sums[2][3] = {};
  for (int64_t at = start + threadIdx.x * VECTOR; at < stop; at += TILE) {
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
        add_element<A, REFERENCE>(b_o, b_r, b_y, sums[half]);
      }
    }
  }
  store_partial(a, sums, pair, i_chunk);
}

// any N, alignment and mix of dtypes
template <class A, bool REFERENCE>
__global__ void __launch_bounds__(THREADS) errors_any_kernel(Errors a) {
  const int64_t pair = blockIdx.x / a.chunks, i_chunk = blockIdx.x % a.chunks;
  const int64_t start = i_chunk * a.chunk;
  const int64_t stop = start + a.chunk < a.n ? start + a.chunk : a.n;
  A sums[2][3] = {};
  for (int64_t at = start + threadIdx.x; at < stop; at += THREADS) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t sample = pair + half * a.pairs;
      const A o = load_any<A>(a.policy, row_of(a.policy, sample) * a.n + at);
      const A y = load_any<A>(a.target, row_of(a.target, sample) * a.n + at);
      const A r = REFERENCE ? load_any<A>(a.reference, row_of(a.reference, sample) * a.n + at) : o;
      add_element<A, REFERENCE>(o, r, y, sums[half]);
    }
  }
  store_partial(a, sums, pair, i_chunk);
}

struct Finish {
  const void* partial;
  Schedule schedule;
  Objective objective;
  Column errors;  // cached, [2B]; data null: none
  bool has_prediction;
  void *loss, *logits, *policy_error, *reference_error, *margin;
  int64_t pairs, n, chunks;
};

// mean of a row from its chunks' sums, by one warp, in double
template <class A>
__device__ double mean_of_chunks(const A* sums, int64_t chunks, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) sum += static_cast<double>(sums[i]);
  return warp_sum(sum) / static_cast<double>(n);
}

// One block: a warp per pair for errors and logits, then a thread per pair for the losses.
template <class A>
__global__ void __launch_bounds__(THREADS) finish_kernel(Finish a) {
  const A* partial = static_cast<const A*>(a.partial);
  A* logits = static_cast<A*>(a.logits);
  const int64_t rows = 2 * a.pairs;
  for (int64_t pair = threadIdx.x / 32; pair < a.pairs; pair += WARPS) {
    double d[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = pair + half * a.pairs;
      const double e = mean_of_chunks(partial + row * a.chunks, a.chunks, a.n);
      double e_reference = 0;
      d[half] = e;
      if (a.has_prediction) {
        e_reference = mean_of_chunks(partial + (rows + row) * a.chunks, a.chunks, a.n);
        d[half] = mean_of_chunks(partial + (2 * rows + row) * a.chunks, a.chunks, a.n);
      } else if (a.errors.data) {
        e_reference = element(a.errors, row);
        d[half] = e - e_reference;
      }
      if (threadIdx.x % 32) continue;
      static_cast<A*>(a.policy_error)[row] = static_cast<A>(e);
      if (a.has_prediction || a.errors.data) {
        static_cast<A*>(a.reference_error)[row] = static_cast<A>(e_reference);
      }
    }
    if (threadIdx.x % 32) continue;
    logits[pair] = static_cast<A>(logit_of(a.schedule, a.objective, pair, a.pairs, d[0], d[1]));
    const int64_t t = timestep_of(a.schedule, pair);
    static_cast<A*>(a.margin)[pair] = static_cast<A>(element(a.schedule.margins, t));
  }
  __syncthreads();
  // about the first pair's loss: exact when all are equal, so log 2 stays log 2
  const double first = link_loss(static_cast<double>(logits[0]), a.objective);
  double sum = 0;
  for (int64_t pair = threadIdx.x; pair < a.pairs; pair += THREADS) {
    sum += link_loss(static_cast<double>(logits[pair]), a.objective) - first;
  }
  __shared__ double by_warp[WARPS];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += by_warp[warp];
  *static_cast<A*>(a.loss) = static_cast<A>(first + sum / static_cast<double>(a.pairs));
}

template <class A>
struct Gradient {
  Rows policy, target;
  void* gradient;  // rows and dtype of policy
  Schedule schedule;
  Objective objective;
  const A *grad_loss, *grad_logits, *grad_policy_error;  // null: absent
  const A* logits;
  int64_t pairs, n, tiles;
};

template <class A>
__device__ __forceinline__ A factor_of(const Gradient<A>& a, int64_t pair, int half) {
  const int64_t row = pair + half * a.pairs;
  const Incoming<A> incoming{a.grad_loss ? *a.grad_loss : A(0),
                             a.grad_logits ? a.grad_logits[pair] : A(0),
                             a.grad_policy_error ? a.grad_policy_error[row] : A(0),
                             a.grad_loss != nullptr};
  return gradient_factor(a.schedule, a.objective, incoming, a.logits[pair], pair, half, a.pairs, a.n);
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
  const bool shared = a.policy.rows == a.pairs;
  const A factors[2] = {factor_of(a, pair, 0), factor_of(a, pair, 1)};
  A g[2][VECTOR];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const A error = widened<A>(o[half].elements[i]) - widened<A>(y[half].elements[i]);
      g[half][i] = error * factors[half];
    }
  }
  Pack<P> out[2];
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    out[0].elements[i] = narrowed<P>(shared ? g[0][i] + g[1][i] : g[0][i]);
    out[1].elements[i] = narrowed<P>(g[1][i]);
  }
  store_pack(a.gradient, pair * a.n + at, out[0]);
  if (!shared) store_pack(a.gradient, (pair + a.pairs) * a.n + at, out[1]);
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

// Calls launch(A, P, Y) with values of the types of a vectorised kernel; false if there is none.
template <class Launch>
bool vectorised(DType policy, DType target, int64_t n, bool aligned, Launch launch) {
  if (n % VECTOR || !aligned) return false;
  if (policy == F64 && target == F64) return launch(0.0, 0.0, 0.0), true;
  if (policy == F32 && target == F32) return launch(0.0f, 0.0f, 0.0f), true;
  const __nv_bfloat16 bf16{};
  const __half fp16{};
  if (policy == BF16 && target == BF16) return launch(0.0f, bf16, bf16), true;
  if (policy == BF16 && target == F32) return launch(0.0f, bf16, 0.0f), true;
  if (policy == F16 && target == F16) return launch(0.0f, fp16, fp16), true;
  if (policy == F16 && target == F32) return launch(0.0f, fp16, 0.0f), true;
  return false;
}

void launch_errors(const Errors& a, bool wide, cudaStream_t stream) {
  const unsigned blocks = blocks_of(a.pairs, a.chunks);
  const bool has = a.reference.data;
  const bool aligned = is_aligned(a.policy.data) && is_aligned(a.reference.data) &&
                       is_aligned(a.target.data) && (!has || a.reference.dtype == a.policy.dtype);
  const bool done = vectorised(
      a.policy.dtype, a.target.dtype, a.n, aligned, [&](auto acc, auto policy, auto target) {
        using A = decltype(acc);
        using P = decltype(policy);
        using Y = decltype(target);
        has ? errors_kernel<A, P, Y, true><<<blocks, THREADS, 0, stream>>>(a)
            : errors_kernel<A, P, Y, false><<<blocks, THREADS, 0, stream>>>(a);
      });
  if (!done && wide) {
    has ? errors_any_kernel<double, true><<<blocks, THREADS, 0, stream>>>(a)
        : errors_any_kernel<double, false><<<blocks, THREADS, 0, stream>>>(a);
  } else if (!done) {
    has ? errors_any_kernel<float, true><<<blocks, THREADS, 0, stream>>>(a)
        : errors_any_kernel<float, false><<<blocks, THREADS, 0, stream>>>(a);
  }
  check_launch("errors_kernel");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_cuda(
    Tensor policy,             // [2B, C, H, W], or [B, C, H, W] shared by the pair
    OptionalTensor reference,  // rows of its own, as policy
    OptionalTensor errors,     // [2B], the reference's, instead of its prediction
    Tensor target,             // [2B, C, H, W] or [B, C, H, W]
    Tensor timesteps,          // int64 [B] or [2B]
    Tensor weights,            // [T]
    Tensor margins,            // [T]
    double beta, double lose_weight, int64_t link, double label_smoothing) {
  if (reference) check_device(*reference, policy, "reference");
  if (errors) check_device(*errors, policy, "reference");
  check_device(target, policy, "target");
  check_device(timesteps, policy, "timesteps");
  check_device(weights, policy, "weights");
  check_device(margins, policy, "margins");
  const torch::stable::accelerator::DeviceGuard guard(policy.get_device_index());
  const cudaStream_t stream = current_stream(policy);
  const Forward f = forward_of(policy, reference, errors, target, timesteps, weights, margins,
                               {link, beta, lose_weight, label_smoothing});
  const int64_t part = (f.n + MAX_CHUNKS - 1) / MAX_CHUNKS;
  const int64_t chunk = (part + TILE - 1) / TILE * TILE, chunks = (f.n + chunk - 1) / chunk;
  const Tensor partial = empty_like_of(policy, {3, 2 * f.pairs, chunks}, f.wide);
  launch_errors({f.policy, f.reference, f.target, partial.data_ptr(), f.pairs, f.n, chunk, chunks},
                f.wide, stream);
  const Finish finish{partial.data_ptr(),        f.schedule,
                      f.objective,               f.errors,
                      f.reference.data != nullptr, f.loss.data_ptr(),
                      f.logits.data_ptr(),       f.policy_error.data_ptr(),
                      f.reference_error.data_ptr(), f.margin.data_ptr(),
                      f.pairs,                   f.n,
                      chunks};
  f.wide ? finish_kernel<double><<<1, THREADS, 0, stream>>>(finish)
         : finish_kernel<float><<<1, THREADS, 0, stream>>>(finish);
  check_launch("finish_kernel");
  return f.outputs();
}

namespace {

// In the type of the logits, which is double if any input is.
template <class A>
void launch_gradient(const Gradient<A>& a, cudaStream_t stream) {
  const unsigned blocks = blocks_of(a.pairs, a.tiles);
  const bool aligned =
      is_aligned(a.policy.data) && is_aligned(a.target.data) && is_aligned(a.gradient);
  const bool done = vectorised(
      a.policy.dtype, a.target.dtype, a.n, aligned, [&](auto acc, auto policy, auto target) {
        using P = decltype(policy);
        using Y = decltype(target);
        if constexpr (sizeof(A) == sizeof(acc)) {
          gradient_kernel<A, P, Y><<<blocks, THREADS, 0, stream>>>(a);
        } else {
          gradient_any_kernel<A><<<blocks, THREADS, 0, stream>>>(a);
        }
      });
  if (!done) gradient_any_kernel<A><<<blocks, THREADS, 0, stream>>>(a);
  check_launch("gradient_kernel");
}

}  // namespace

void preference_loss_backward_cuda(Tensor gradient,                   // as policy
                                   OptionalTensor grad_loss,          // []
                                   OptionalTensor grad_logits,        // [B]
                                   OptionalTensor grad_policy_error,  // [2B]
                                   Tensor policy,     // [2B, C, H, W] or [B, C, H, W]
                                   Tensor target,     // [2B, C, H, W] or [B, C, H, W]
                                   Tensor timesteps,  // int64 [B] or [2B]
                                   Tensor logits,     // [B]
                                   Tensor weights,    // [T]
                                   double beta, double lose_weight, int64_t link,
                                   double label_smoothing) {
  const int64_t pairs = logits.numel(), n = policy.numel() / policy.size(0);
  for (const Tensor* x : {&gradient, &target, &timesteps, &logits, &weights}) {
    check_device(*x, policy, "preference_loss_backward");
  }
  for (const OptionalTensor* x : {&grad_loss, &grad_logits, &grad_policy_error}) {
    if (*x) check_device(**x, policy, "preference_loss_backward");
  }
  const torch::stable::accelerator::DeviceGuard guard(policy.get_device_index());
  const Rows o = rows_of(policy, pairs, n, "policy"), y = rows_of(target, pairs, n, "target");
  const Rows g = rows_of(gradient, pairs, n, "gradient");
  STD_TORCH_CHECK(g.rows == o.rows && g.dtype == o.dtype, "gradient: expected one like policy");
  const ScalarType dtype = logits.scalar_type();
  const bool wide = column_of(logits, pairs, "logits").wide;
  STD_TORCH_CHECK(wide || (o.dtype != F64 && y.dtype != F64), "logits: expected float64");
  const auto launch = [&](auto acc) {
    using A = decltype(acc);
    launch_gradient<A>({o, y, gradient.data_ptr(), schedule_of(timesteps, weights, nullptr, pairs),
                        {link, beta, lose_weight, label_smoothing},
                        optional_data<A>(grad_loss, 1, dtype, "grad_loss"),
                        optional_data<A>(grad_logits, pairs, dtype, "grad_logits"),
                        optional_data<A>(grad_policy_error, 2 * pairs, dtype, "grad_policy_error"),
                        static_cast<const A*>(logits.data_ptr()), pairs, n, (n + TILE - 1) / TILE},
                       current_stream(policy));
  };
  wide ? launch(0.0) : launch(0.0f);
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CUDA, m) {
  m.impl("preference_loss", TORCH_BOX(&dde_fast::preference_loss_cuda));
  m.impl("preference_loss_backward", TORCH_BOX(&dde_fast::preference_loss_backward_cuda));
}
