// The noise's vector loops, compiled once per instruction set (DDE_FAST_ISA, DDE_FAST_VECTOR
// bytes). Every step is exact or rounded once, so all sets give the same bits.

#include "cpu_convert.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace dde_fast {
namespace DDE_FAST_ISA {

// 32-bit words, each in the low half of a 64-bit lane; the high halves hold anything.
typedef uint64_t Lanes __attribute__((vector_size(DDE_FAST_VECTOR)));
constexpr int64_t WIDTH = DDE_FAST_VECTOR / 8;
constexpr int64_t CHAINS = 2;  // independent vectors: a round waits for the one before

struct Words {
  Lanes v[CHAINS];
};

DDE_FN Words operator^(const Words& a, const Words& b) {
  return {{a.v[0] ^ b.v[0], a.v[1] ^ b.v[1]}};
}
DDE_FN Words operator^(const Words& a, uint32_t key) { return {{a.v[0] ^ key, a.v[1] ^ key}}; }

DDE_FN Lanes low_product(const Lanes& a, uint32_t m) {
  const Lanes factor = Lanes{} + m;
#if DDE_FAST_VECTOR == 64
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif DDE_FAST_VECTOR == 32
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xFFFFFFFFu) * factor;
#endif
}

struct MultiplyLanes {
  DDE_FN_MEMBER void multiply(const Words& a, uint32_t m, Words& high, Words& low) {
    low = {{low_product(a.v[0], m), low_product(a.v[1], m)}};
    high = {{low.v[0] >> 32, low.v[1] >> 32}};
  }
};

namespace {

// The words of BLOCK / 4 Philox blocks from `first` on, word by word.
void words_of(const NoiseTask& task, int64_t pair, uint32_t first, uint32_t words[4][BLOCK / 4]) {
  const uint64_t id = static_cast<uint64_t>(task.stream.pair_ids[pair]);
  const uint32_t key_low = static_cast<uint32_t>(task.stream.seed);
  const uint32_t key_high = static_cast<uint32_t>(task.stream.seed >> 32);
  const Lanes low = Lanes{} + (id & 0xFFFFFFFFu), high = Lanes{} + (id >> 32);
  const Lanes draw = Lanes{} + static_cast<uint32_t>(task.stream.draws[pair]);
  Lanes count;
  for (int64_t k = 0; k < WIDTH; ++k) count[k] = first + static_cast<uint64_t>(k);
  for (int64_t i = 0; i < BLOCK / 4; i += CHAINS * WIDTH) {
    Words c[4] = {{{count + i, count + (i + WIDTH)}}, {{low, low}}, {{high, high}}, {{draw, draw}}};
    philox4x32<MultiplyLanes>(c, key_low, key_high);
    for (int64_t j = 0; j < 4; ++j) {
      for (int64_t k = 0; k < CHAINS * WIDTH; ++k) {
        words[j][i + k] = static_cast<uint32_t>(c[j].v[k / WIDTH][k % WIDTH]);
      }
    }
  }
}

// BLOCK normals in the order of elements; a loop each, which the compiler vectorises
void normals_of(const uint32_t words[4][BLOCK / 4], float* out) {
  alignas(64) float x[4][BLOCK / 4];
  for (int64_t j = 0; j < 4; j += 2) {
    for (int64_t i = 0; i < BLOCK / 4; ++i) turn(uniform(words[j + 1][i]), x[j][i], x[j + 1][i]);
    for (int64_t i = 0; i < BLOCK / 4; ++i) {
      const float r = radius(uniform(words[j][i]));
      x[j][i] *= r;
      x[j + 1][i] *= r;
    }
  }
  for (int64_t i = 0; i < BLOCK / 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = x[j][i];
  }
}

// moves n elements from `at` on between a channels_last row and a dense buffer
template <bool WRITE, class E>
DDE_FN void move(const Layout& layout, int64_t at, int64_t n, E* row, E* dense) {
  const int64_t channels = layout.channels, space = layout.space;
  while (n > 0) {  // a channel at a time
    const int64_t pixel = at % space, run = n < space - pixel ? n : space - pixel;
    E* elements = row + pixel * channels + at / space;
    for (int64_t i = 0; i < run; ++i) {
      if (WRITE) {
        elements[i * channels] = dense[i];
      } else {
        dense[i] = elements[i * channels];
      }
    }
    at += run;
    n -= run;
    dense += run;
  }
}

template <bool WRITE>
DDE_FN void move(const Layout& layout, DType dtype, int64_t row, int64_t n_row, int64_t at,
                 int64_t n, void* data, void* dense) {
  if (bytes_of(dtype) == 2) {
    move<WRITE>(layout, at, n, static_cast<uint16_t*>(data) + row * n_row,
                static_cast<uint16_t*>(dense));
  } else if (dtype == F32) {
    move<WRITE>(layout, at, n, static_cast<float*>(data) + row * n_row, static_cast<float*>(dense));
  } else {
    move<WRITE>(layout, at, n, static_cast<double*>(data) + row * n_row,
                static_cast<double*>(dense));
  }
}

// n numbers as elements `at` … of a row of noise or noisy
DDE_FN void store(const NoiseTask& task, const float* x, void* data, int64_t row, int64_t at,
                  int64_t n) {
  if (task.to.channels == 1) return narrow(x, data, task.dtype, row * task.n + at, n);
  alignas(64) unsigned char dense[8 * BLOCK];
  narrow(x, dense, task.dtype, 0, n);
  move<true>(task.to, task.dtype, row, task.n, at, n, data, dense);
}

// elements `at` … of a row of latents as floats: in place, or in one of the two buffers
DDE_FN const float* load(const NoiseTask& task, int64_t row, int64_t at, int64_t n, void* dense,
                         float* buffer) {
  const Rows& x = task.latents;
  if (task.from.channels == 1) return widen(x, row, task.n, at, n, buffer);
  move<false>(task.from, x.dtype, row_of(x, row), task.n, at, n, const_cast<void*>(x.data), dense);
  return widen(Rows{dense, 1, x.dtype}, 0, n, 0, n, buffer);
}

}  // namespace

void noise_loop(const void* argument, int64_t begin, int64_t end) {
  const NoiseTask& task = *static_cast<const NoiseTask*>(argument);
  alignas(64) uint32_t words[4][BLOCK / 4];
  alignas(64) float noise[BLOCK], b_x[BLOCK], noisy[BLOCK];
  alignas(64) unsigned char dense[8 * BLOCK];
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t pair = i_task / task.chunks, chunk = i_task % task.chunks;
    const int64_t stop = (chunk + 1) * CHUNK < task.n ? (chunk + 1) * CHUNK : task.n;
    for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      words_of(task, pair, static_cast<uint32_t>(at / 4), words);
      normals_of(words, noise);
      store(task, noise, task.noise, pair, at, n);
      if (!task.noisy) continue;
      const float signal = task.signal[pair], sigma = task.sigma[pair];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t sample = pair + half * task.pairs;
        const float* x = load(task, sample, at, n, dense, b_x);
        for (int64_t i = 0; i < n; ++i) noisy[i] = signal * x[i] + sigma * noise[i];
        store(task, noisy, task.noisy, sample, at, n);
      }
    }
  }
}

}  // namespace DDE_FAST_ISA
}  // namespace dde_fast
