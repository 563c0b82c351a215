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

}  // namespace

void noise_loop(const void* argument, int64_t begin, int64_t end) {
  const NoiseTask& task = *static_cast<const NoiseTask*>(argument);
  alignas(64) uint32_t words[4][BLOCK / 4];
  alignas(64) float noise[BLOCK], b_x[BLOCK], noisy[BLOCK];
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t pair = i_task / task.chunks, chunk = i_task % task.chunks;
    const int64_t stop = (chunk + 1) * CHUNK < task.n ? (chunk + 1) * CHUNK : task.n;
    for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      words_of(task, pair, static_cast<uint32_t>(at / 4), words);
      normals_of(words, noise);
      narrow(noise, task.noise, task.dtype, pair * task.n + at, n);
      if (!task.noisy) continue;
      const float signal = task.signal[pair], sigma = task.sigma[pair];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t sample = pair + half * task.pairs;
        const float* x = widen(task.latents, sample, task.n, at, n, b_x);
        for (int64_t i = 0; i < n; ++i) noisy[i] = signal * x[i] + sigma * noise[i];
        narrow(noisy, task.noisy, task.dtype, sample * task.n + at, n);
      }
    }
  }
}

}  // namespace DDE_FAST_ISA
}  // namespace dde_fast
