// The DDIM step on CUDA: one launch for the samples of all candidates, one for their log-densities,
// one backward. A thread holds μ of 8 elements while it goes through the candidates, so prediction
// and sample are read once. No atomics: the order of every sum is fixed. Built without contraction,
// so float32 samples are the CPU's to the bit.

#include "cuda.cuh"

namespace dde_fast {
namespace {

template <class A, class E>
__device__ __forceinline__ void unpack(const Rows& rows, int64_t at, A (&x)[VECTOR]) {
  const Pack<E> pack = load_pack<E>(rows.data, at);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) x[i] = widened<A>(pack.elements[i]);
}

// VECTOR elements from `at` on, 16 bytes at a time if `vector`; beyond `count` they are zero
template <class A>
__device__ __forceinline__ void load(const Rows& rows, int64_t at, int count, bool vector,
                                     A (&x)[VECTOR]) {
  if (!vector || count < VECTOR) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] = i < count ? load_any<A>(rows, at + i) : A(0);
  } else if (rows.dtype == F32) {
    unpack<A, float>(rows, at, x);
  } else if (rows.dtype == BF16) {
    unpack<A, __nv_bfloat16>(rows, at, x);
  } else if (rows.dtype == F16) {
    unpack<A, __half>(rows, at, x);
  } else {
    unpack<A, double>(rows, at, x);
  }
}

template <class A, class E>
__device__ __forceinline__ void pack(void* data, int64_t at, const A (&x)[VECTOR]) {
  Pack<E> pack;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) pack.elements[i] = narrowed<E>(x[i]);
  store_pack(data, at, pack);
}

template <class A>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t at, int count, bool vector,
                                      const A (&x)[VECTOR]) {
  if (!vector || count < VECTOR) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (i < count) store_any(data, dtype, at + i, x[i]);
    }
  } else if (dtype == F32) {
    pack<A, float>(data, at, x);
  } else if (dtype == BF16) {
    pack<A, __nv_bfloat16>(data, at, x);
  } else if (dtype == F16) {
    pack<A, __half>(data, at, x);
  } else {
    pack<A, double>(data, at, x);
  }
}

// x as it will be read back from a tensor of the dtype
template <class A>
__device__ __forceinline__ A rounded(DType dtype, A x) {
  if (dtype == F32) return widened<A>(narrowed<float>(x));
  if (dtype == BF16) return widened<A>(narrowed<__nv_bfloat16>(x));
  if (dtype == F16) return widened<A>(narrowed<__half>(x));
  return x;
}

// A thread's elements: VECTOR of them from `at` of `row` on.
struct Place {
  int64_t row, at;
  int count;  // how many of them there are, 0 to VECTOR
};

__device__ __forceinline__ Place place_of(int64_t tiles, int64_t n) {
  const int64_t row = blockIdx.x / tiles, at = blockIdx.x % tiles * TILE + threadIdx.x * VECTOR;
  const int64_t left = n - at;
  return {row, at, left >= VECTOR ? VECTOR : left > 0 ? static_cast<int>(left) : 0};
}

template <class A>
__device__ __forceinline__ void load_means(const Step& step, const Place& place, bool vector,
                                           A (&mean)[VECTOR]) {
  A x[VECTOR], o[VECTOR];
  const int64_t from = place.row * step.n + place.at;
  load(step.sample, from, place.count, vector, x);
  load(step.prediction, from, place.count, vector, o);
  means(step.type, step_row<A>(step, place.row), x, o, mean, VECTOR);
}

struct StepForward {
  Step step;      // candidates: the noise, or the next samples
  void* next;     // [K·B, N], null: given
  void* partial;  // [K·B, tiles·WARPS]: sums of (next - μ)²
  void* log_prob;
  int64_t tiles;
  bool vector;  // N a multiple of VECTOR, all aligned
};

// every warp's sums go to a place of their own, so no candidate waits for the one before
template <class A>
__global__ void __launch_bounds__(THREADS) step_kernel(StepForward a) {
  const Step& step = a.step;
  const Place place = place_of(a.tiles, step.n);
  const A sigma = step_row<A>(step, place.row).sigma;
  A mean[VECTOR];
  load_means(step, place, a.vector, mean);
  for (int64_t k = 0; k < step.count; ++k) {
    const int64_t candidate = k * step.batch + place.row, at = candidate * step.n + place.at;
    A next[VECTOR];
    load(step.candidates, at, place.count, a.vector, next);
    if (a.next) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        next[i] = rounded(step.sample.dtype, mean[i] + sigma * next[i]);
      }
      store(a.next, step.sample.dtype, at, place.count, a.vector, next);
    }
    A sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const A error = next[i] - mean[i];
      sum += i < place.count ? error * error : A(0);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32) continue;
    const int64_t part = (candidate * a.tiles + blockIdx.x % a.tiles) * WARPS + threadIdx.x / 32;
    static_cast<A*>(a.partial)[part] = sum;
  }
}

// a warp per candidate
template <class A>
__global__ void __launch_bounds__(THREADS) density_kernel(StepForward a) {
  const Step& step = a.step;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (i >= step.batch * step.count) return;
  const int64_t parts = a.tiles * WARPS;
  const A* partial = static_cast<const A*>(a.partial) + i * parts;
  double sum = 0;
  for (int64_t j = threadIdx.x % 32; j < parts; j += 32) sum += static_cast<double>(partial[j]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32) return;
  const double sigma = step_row<double>(step, i % step.batch).sigma;
  static_cast<A*>(a.log_prob)[i] = static_cast<A>(log_density(sum, sigma, step.n));
}

struct StepBackward {
  Step step;  // candidates: the next samples
  StepIncoming incoming;
  void* gradient;  // rows and dtype of prediction
  int64_t tiles;
  bool vector;
};

template <class A>
__global__ void __launch_bounds__(THREADS) step_gradient_kernel(StepBackward a) {
  const Step& step = a.step;
  const Place place = place_of(a.tiles, step.n);
  if (place.count == 0) return;
  A mean[VECTOR], x[VECTOR], g[VECTOR] = {};
  if (a.incoming.log_prob.data) load_means(step, place, a.vector, mean);
  for (int64_t k = 0; k < step.count; ++k) {
    const int64_t candidate = k * step.batch + place.row, at = candidate * step.n + place.at;
    if (a.incoming.next.data) {
      load(a.incoming.next, at, place.count, a.vector, x);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) g[i] += x[i];
    }
    if (a.incoming.log_prob.data) {
      const double sigma = step_row<double>(step, place.row).sigma;
      const double incoming = element(a.incoming.log_prob, candidate);
      const A factor = static_cast<A>(density_factor(incoming, sigma, step.n));
      load(step.candidates, at, place.count, a.vector, x);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) g[i] += factor * (x[i] - mean[i]);
    }
  }
  const A slope = static_cast<A>(slope_of(step, place.row));
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) g[i] *= slope;
  store(a.gradient, step.prediction.dtype, place.row * step.n + place.at, place.count, a.vector, g);
}

bool is_vector(const Step& step, std::initializer_list<const void*> others) {
  bool aligned = step.n % VECTOR == 0 && is_aligned(step.sample.data) &&
                 is_aligned(step.prediction.data) && is_aligned(step.candidates.data);
  for (const void* x : others) aligned = aligned && is_aligned(x);
  return aligned;
}

}  // namespace

void ddim_step_cuda(Tensor log_prob,      // [K·B]
                    OptionalTensor next,  // [K·B, …], dtype of sample; absent: it is given
                    Tensor prediction,    // [B, …]
                    Tensor sample,        // [B, …]
                    Tensor given,         // [K·B, …], the noise; without `next` the next samples
                    Tensor coefficients,  // float32 [B, 5]
                    int64_t prediction_type) {
  for (const Tensor* x : {&log_prob, &prediction, &given, &coefficients}) {
    check_device(*x, sample, "ddim_step");
  }
  if (next) check_device(*next, sample, "next");
  const torch::stable::accelerator::DeviceGuard guard(sample.get_device_index());
  const cudaStream_t stream = current_stream(sample);
  StepForward a{};
  a.step = step_of(prediction, sample, given, coefficients, prediction_type);
  const int64_t candidates = a.step.batch * a.step.count;
  const bool wide = a.step.wide;
  check_vector(log_prob, candidates, wide ? ScalarType::Double : ScalarType::Float, "log_prob");
  a.next = next_of(a.step, next);
  a.log_prob = log_prob.data_ptr();
  a.tiles = (a.step.n + TILE - 1) / TILE;
  a.vector = is_vector(a.step, {a.next});
  const Tensor partial = empty_like_of(sample, candidates * a.tiles * WARPS, wide);
  a.partial = partial.data_ptr();
  const unsigned blocks = blocks_of(a.step.batch, a.tiles);
  wide ? step_kernel<double><<<blocks, THREADS, 0, stream>>>(a)
       : step_kernel<float><<<blocks, THREADS, 0, stream>>>(a);
  check_launch("step_kernel");
  const unsigned warps = blocks_of(1, (candidates + WARPS - 1) / WARPS);
  wide ? density_kernel<double><<<warps, THREADS, 0, stream>>>(a)
       : density_kernel<float><<<warps, THREADS, 0, stream>>>(a);
  check_launch("density_kernel");
}

void ddim_step_backward_cuda(Tensor gradient,               // as prediction
                             OptionalTensor grad_next,      // [K·B, …]
                             OptionalTensor grad_log_prob,  // [K·B]
                             Tensor prediction,             // [B, …]
                             Tensor sample,                 // [B, …]
                             Tensor next,                   // [K·B, …]
                             Tensor coefficients,           // float32 [B, 5]
                             int64_t prediction_type) {
  for (const Tensor* x : {&gradient, &prediction, &next, &coefficients}) {
    check_device(*x, sample, "ddim_step_backward");
  }
  for (const OptionalTensor* x : {&grad_next, &grad_log_prob}) {
    if (*x) check_device(**x, sample, "ddim_step_backward");
  }
  const torch::stable::accelerator::DeviceGuard guard(sample.get_device_index());
  StepBackward a{};
  a.step = step_of(prediction, sample, next, coefficients, prediction_type);
  a.incoming = incoming_of(a.step, gradient, grad_next, grad_log_prob);
  a.gradient = gradient.data_ptr();
  a.tiles = (a.step.n + TILE - 1) / TILE;
  a.vector = is_vector(a.step, {a.incoming.next.data, a.gradient});
  const unsigned blocks = blocks_of(a.step.batch, a.tiles);
  const cudaStream_t stream = current_stream(sample);
  a.step.wide ? step_gradient_kernel<double><<<blocks, THREADS, 0, stream>>>(a)
              : step_gradient_kernel<float><<<blocks, THREADS, 0, stream>>>(a);
  check_launch("step_gradient_kernel");
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CUDA, m) {
  m.impl("ddim_step", TORCH_BOX(&dde_fast::ddim_step_cuda));
  m.impl("ddim_step_backward", TORCH_BOX(&dde_fast::ddim_step_backward_cuda));
}
