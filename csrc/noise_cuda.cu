// The noise on CUDA: one thread per Philox block makes four normals and both halves' noisy elements.
// Built without contraction, so the normals and the noisy latents are the CPU's to the bit.

#include "cuda.cuh"

namespace dde_fast {
namespace {

struct Noise {
  Stream stream;
  void *noise, *noisy;  // [B, N] and [2B, N]; noisy null: noise alone
  DType dtype;          // of both
  Rows latents;
  Layout from, to;    // of the latents, and of noise and noisy
  Layout tiles_of;    // as `to`, where the threads follow the order of memory
  Schedule schedule;  // ᾱ in the place of the weights
  int64_t pairs, n, tiles;
  bool vector;  // N a multiple of 4, all aligned
};

// two 16-bit numbers in one word, the first in the low half
template <class E>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  return static_cast<uint32_t>(__builtin_bit_cast(uint16_t, narrowed<E>(low))) |
         static_cast<uint32_t>(__builtin_bit_cast(uint16_t, narrowed<E>(high))) << 16;
}

__device__ __forceinline__ void store4(const Noise& a, void* data, int64_t at, int count,
                                       const float (&x)[4]) {
  if (a.vector && a.dtype == F32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + at) = make_float4(x[0], x[1], x[2], x[3]);
  } else if (a.vector && a.dtype == BF16) {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + at) =
        make_uint2(packed<__nv_bfloat16>(x[0], x[1]), packed<__nv_bfloat16>(x[2], x[3]));
  } else if (a.vector && a.dtype == F16) {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + at) =
        make_uint2(packed<__half>(x[0], x[1]), packed<__half>(x[2], x[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) store_any(data, a.dtype, at + i, x[i]);
    }
  }
}

template <class E>
__device__ __forceinline__ void unpack(uint2 words, float (&x)[4]) {
  x[0] = widened<float>(__builtin_bit_cast(E, static_cast<uint16_t>(words.x)));
  x[1] = widened<float>(__builtin_bit_cast(E, static_cast<uint16_t>(words.x >> 16)));
  x[2] = widened<float>(__builtin_bit_cast(E, static_cast<uint16_t>(words.y)));
  x[3] = widened<float>(__builtin_bit_cast(E, static_cast<uint16_t>(words.y >> 16)));
}

__device__ __forceinline__ void load4(const Noise& a, int64_t at, int count, float (&x)[4]) {
  const Rows& rows = a.latents;
  if (a.vector && rows.dtype == F32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(rows.data) + at);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else if (a.vector && (rows.dtype == BF16 || rows.dtype == F16)) {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(rows.data) + at);
    rows.dtype == BF16 ? unpack<__nv_bfloat16>(v, x) : unpack<__half>(v, x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < count ? load_any<float>(rows, at + i) : 0.0f;
  }
}

// elements `at` … of a row of noise or noisy
__device__ __forceinline__ void store_row(const Noise& a, void* data, int64_t row, int64_t at,
                                          int count, const float (&x)[4]) {
  if (a.to.channels == 1) return store4(a, data, row * a.n + at, count, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) store_any(data, a.dtype, row * a.n + offset(a.to, at + i), x[i]);
  }
}

__device__ __forceinline__ void load_row(const Noise& a, int64_t row, int64_t at, int count,
                                         float (&x)[4]) {
  if (a.from.channels == 1) return load4(a, row * a.n + at, count, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = i < count ? load_any<float>(a.latents, row * a.n + offset(a.from, at + i)) : 0.0f;
  }
}

// As many threads as channels hold four pixels of one channel each; afterwards each holds the next
// four elements of their common memory.
__device__ __forceinline__ void transpose(uint32_t channels, float (&x)[4]) {
  __shared__ float tile[4 * THREADS];
  const uint32_t channel = threadIdx.x % channels;
#pragma unroll
  for (int i = 0; i < 4; ++i) tile[4 * (threadIdx.x - channel) + i * channels + channel] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = tile[4 * threadIdx.x + i];
}

// TILES: channels_last, made in the order of memory
template <bool TILES>
__global__ void __launch_bounds__(THREADS) noise_kernel(Noise a) {
  const int64_t pair = blockIdx.x / a.tiles;
  __shared__ float coefficients[2];
  if (a.noisy) {  // square roots in double, once a block
    if (threadIdx.x == 0) {
      noise_coefficients(a.schedule, pair, a.pairs, coefficients[0], coefficients[1]);
    }
    __syncthreads();
  }
  const int64_t index = blockIdx.x % a.tiles * THREADS + threadIdx.x, at = 4 * index;
  if (!TILES && at >= a.n) return;
  const int count = a.n - at < 4 ? static_cast<int>(a.n - at) : 4;
  uint32_t block = static_cast<uint32_t>(index);
  if constexpr (TILES) {
    const uint32_t channels = a.tiles_of.channels;
    block = block % channels * (a.tiles_of.space / 4) + block / channels;
  }
  uint32_t words[4];
  block_words(a.stream, pair, block, words);
  float noise[4];
  box_muller(words, noise);
  if constexpr (TILES) {
    transpose(a.tiles_of.channels, noise);
    if (at >= a.n) return;
  }
  store_row(a, a.noise, pair, at, count, noise);
  if (!a.noisy) return;
  const float signal = coefficients[0], sigma = coefficients[1];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = pair + half * a.pairs;
    float x[4];
    load_row(a, row, at, count, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = signal * x[i] + sigma * noise[i];
    store_row(a, a.noisy, row, at, count, x);
  }
}

// words [B, K, 4] of blocks first, first + 1, …
__global__ void __launch_bounds__(THREADS)
    words_kernel(Stream stream, int64_t* words, int64_t pairs, int64_t blocks, uint32_t first) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= pairs * blocks) return;
  uint32_t c[4];
  block_words(stream, i / blocks, first + static_cast<uint32_t>(i % blocks), c);
#pragma unroll
  for (int j = 0; j < 4; ++j) words[4 * i + j] = c[j];
}

__global__ void __launch_bounds__(THREADS)
    uniform_kernel(Stream stream, float* out, int64_t pairs, int64_t choice) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (pair < pairs) out[pair] = choice_uniform(stream, pair, choice);
}

Stream stream_on(const Tensor& out, const Tensor& pair_ids, const Tensor& draws, int64_t seed) {
  check_device(pair_ids, out, "pair_ids");
  check_device(draws, out, "draws");
  return stream_of(pair_ids, draws, seed);
}

Noise noise_of(const Tensor& noise, const Tensor& pair_ids, const Tensor& draws, int64_t seed) {
  Noise a{};
  a.stream = stream_on(noise, pair_ids, draws, seed);
  a.pairs = pair_ids.numel();
  a.n = row_size(noise, a.pairs, "noise");
  a.tiles = ((a.n + 3) / 4 + THREADS - 1) / THREADS;
  a.noise = noise.data_ptr();
  a.to = layout_of(noise, "noise");
  a.dtype = dtype_of(noise, "noise");
  a.vector = a.n % 4 == 0 && is_aligned(a.noise);
  return a;
}

// Puts the threads in the order of channels_last memory, where whole groups of `channels` threads
// fill a block: channels_last rows are then moved like contiguous ones, and contiguous latents are
// found through the map the other way round.
bool arrange_tiles(Noise& a) {
  const Layout to = a.to;
  if (to.channels == 1 || THREADS % to.channels || to.space % 4) return false;
  a.tiles_of = to;
  a.to = {1, 0};
  a.from = a.from.channels == 1 ? Layout{to.space, to.channels} : a.to;
  return true;
}

void launch(Noise a, const Tensor& like) {
  if (a.n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const unsigned blocks = blocks_of(a.pairs, a.tiles);
  const cudaStream_t stream = current_stream(like);
  arrange_tiles(a) ? noise_kernel<true><<<blocks, THREADS, 0, stream>>>(a)
                   : noise_kernel<false><<<blocks, THREADS, 0, stream>>>(a);
  check_launch("noise_kernel");
}

}  // namespace

void pair_noise_cuda(Tensor noise,     // [B, …]
                     Tensor pair_ids,  // int64 [B]
                     Tensor draws,     // int64 [B]
                     int64_t seed) {   // the bits of a 64-bit key
  launch(noise_of(noise, pair_ids, draws, seed), noise);
}

void add_noise_cuda(Tensor noisy,           // [2B, …]
                    Tensor noise,           // [B, …], dtype of noisy
                    Tensor latents,         // [2B, …]
                    Tensor timesteps,       // int64 [B] or [2B]
                    Tensor alphas_cumprod,  // [T]
                    Tensor pair_ids, Tensor draws, int64_t seed) {
  Noise a = noise_of(noise, pair_ids, draws, seed);
  for (const Tensor* x : {&noisy, &latents, &timesteps, &alphas_cumprod}) {
    check_device(*x, noise, "add_noise");
  }
  a.latents = rows_of(latents, a.pairs, a.n, "latents");
  const Rows out = rows_of(noisy, a.pairs, a.n, "noisy");
  a.from = layout_of(latents, "latents");
  STD_TORCH_CHECK(out.rows == 2 * a.pairs && out.dtype == a.dtype &&
                      layout_of(noisy, "noisy").channels == a.to.channels,
                  "noisy: expected ", 2 * a.pairs, " rows of noise's dtype and layout");
  a.schedule = schedule_of(timesteps, alphas_cumprod, nullptr, a.pairs);
  a.noisy = noisy.data_ptr();
  a.vector = a.vector && is_aligned(a.noisy) && is_aligned(a.latents.data);
  launch(a, noise);
}

void pair_uniform_cuda(Tensor uniform,  // float32 [B]
                       Tensor pair_ids, Tensor draws, int64_t choice, int64_t seed) {
  const Stream stream = stream_on(uniform, pair_ids, draws, seed);
  const int64_t pairs = pair_ids.numel();
  check_vector(uniform, pairs, ScalarType::Float, "uniform");
  const torch::stable::accelerator::DeviceGuard guard(uniform.get_device_index());
  uniform_kernel<<<blocks_of(1, (pairs + THREADS - 1) / THREADS), THREADS, 0,
                   current_stream(uniform)>>>(stream, static_cast<float*>(uniform.data_ptr()),
                                              pairs, choice);
  check_launch("uniform_kernel");
}

// The raw integers, for the tests.
void pair_words_cuda(Tensor words,  // int64 [B, K, 4], values in [0, 2³²)
                     Tensor pair_ids, Tensor draws,
                     int64_t first_block,  // counter of words[:, 0]
                     int64_t seed) {
  const Stream stream = stream_on(words, pair_ids, draws, seed);
  const int64_t pairs = pair_ids.numel(), blocks = words.numel() / (4 * pairs);
  check_vector(words, 4 * pairs * blocks, ScalarType::Long, "words");
  if (blocks == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(words.get_device_index());
  words_kernel<<<blocks_of(1, (pairs * blocks + THREADS - 1) / THREADS), THREADS, 0,
                 current_stream(words)>>>(stream, static_cast<int64_t*>(words.data_ptr()), pairs,
                                          blocks, static_cast<uint32_t>(first_block));
  check_launch("words_kernel");
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CUDA, m) {
  m.impl("pair_noise", TORCH_BOX(&dde_fast::pair_noise_cuda));
  m.impl("pair_uniform", TORCH_BOX(&dde_fast::pair_uniform_cuda));
  m.impl("pair_words", TORCH_BOX(&dde_fast::pair_words_cuda));
  m.impl("add_noise", TORCH_BOX(&dde_fast::add_noise_cuda));
}
