// Philox4x32-10 and Box-Muller, shared by CPU and CUDA; SPEC in dde_fast/noise.py's docstring.
// Only +, -, ·, √ in fp32, each rounded once (build without contraction): the same bits everywhere.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace dde_fast {

// both halves of the product of two 32-bit words
struct MultiplyWords {
  DDE_FN_MEMBER void multiply(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Ten rounds over c[4]. Word is uint32_t, or a vector of words with a multiplication of its own.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
template <class Multiply = MultiplyWords, class Word>
DDE_FN void philox4x32(Word c[4], uint32_t key_low, uint32_t key_high) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    Multiply::multiply(c[0], 0xD2511F53u, high0, low0);
    Multiply::multiply(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ key_low;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key_high;
    c[3] = low0;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

// The key and counters of all pairs of a call.
struct Stream {
  const int64_t *pair_ids, *draws;  // [B]
  uint64_t seed;
};

// words of one block: counter (block, pair id low, pair id high, draw), key = seed
DDE_FN void block_words(const Stream& stream, int64_t pair, uint32_t block, uint32_t c[4]) {
  const uint64_t id = static_cast<uint64_t>(stream.pair_ids[pair]);
  c[0] = block;
  c[1] = static_cast<uint32_t>(id);
  c[2] = static_cast<uint32_t>(id >> 32);
  c[3] = static_cast<uint32_t>(stream.draws[pair]);
  philox4x32(c, static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32));
}

DDE_FN int32_t float_bits(float x) { return __builtin_bit_cast(int32_t, x); }
DDE_FN float bits_float(int32_t x) { return __builtin_bit_cast(float, x); }

// (x >> 8)·2⁻²⁴ + 2⁻²⁵, in (0, 1]
DDE_FN float uniform(uint32_t x) {
  return static_cast<float>(static_cast<int32_t>(x >> 8)) * 0x1p-24f + 0x1p-25f;
}

// √(-2 ln u). u = 2^k·m with m in [√½, √2): ln u = k·ln 2 + ln(1 + f), f = m - 1 exactly;
// the polynomial is Cephes' logf, ln 2 split so that k times its high part is exact.
DDE_FN float radius(float u) {
  const int32_t bits = float_bits(u) - 0x3F3504F3;  // distance to √½
  const float k = static_cast<float>(bits >> 23);
  const float f = bits_float((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = p * f * z - 2.12194440e-4f * k - 0.5f * z;
  const float log_u = (f + tail) + 0.693359375f * k;
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(-2.0f * log_u);
#else
  return __builtin_sqrtf(-2.0f * log_u);
#endif
}

// cos 2πu and sin 2πu. The nearest quarter turn is taken off exactly, leaving t in [-1/8, 1/8];
// 2π = 6 + 0.283…: 6·t is exact too, so neither result carries the rounding of 2π·u.
DDE_FN void turn(float u, float& cosine, float& sine) {
  const int32_t quarter = static_cast<int32_t>(4.0f * u + 0.5f);
  const float t = u - 0.25f * static_cast<float>(quarter);
  const float z = t * t;
  float p = 42.05869394f;
  p = p * z - 76.70585975f;
  p = p * z + 81.60524928f;
  p = p * z - 41.34170224f;
  const float s = 6.0f * t + t * (0.2831853072f + z * p);
  float q = -26.42625678f;
  q = q * z + 60.24464137f;
  q = q * z - 85.45681721f;
  q = q * z + 64.93939402f;
  const float c = 1.0f + z * (q * z - 19.73920880f);
  const bool swap = quarter & 1;
  const float a = swap ? s : c, b = swap ? c : s;
  // quarters 1, 2 have a negative cosine, 2, 3 a negative sine
  cosine = (quarter + 1) & 2 ? -a : a;
  sine = quarter & 2 ? -b : b;
}

// the pair's number for one choice: blocks counted down from 2³² - 1 never meet the noise's
DDE_FN float choice_uniform(const Stream& stream, int64_t pair, int64_t choice) {
  uint32_t c[4];
  block_words(stream, pair, 0xFFFFFFFFu - static_cast<uint32_t>(choice), c);
  return uniform(c[0]);
}

// elements 4j … 4j+3 from the words of block j
DDE_FN void box_muller(const uint32_t x[4], float out[4]) {
  const float r0 = radius(uniform(x[0])), r2 = radius(uniform(x[2]));
  turn(uniform(x[1]), out[0], out[1]);
  turn(uniform(x[3]), out[2], out[3]);
  out[0] *= r0;
  out[1] *= r0;
  out[2] *= r2;
  out[3] *= r2;
}

}  // namespace dde_fast
