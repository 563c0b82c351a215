// Widening and narrowing of rows for the CPU loops: fp16, bf16, fp32, fp64 to and from float or
// double, nearest even. Plain loops that the compiler vectorises; F16C where the set has it.
#pragma once

#include "cpu.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace dde_fast {

DDE_FN float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }
DDE_FN uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

DDE_FN float from_bf16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

DDE_FN uint16_t to_bf16(float x) {
  const uint32_t u = to_bits(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
}

// By shifts, one multiplication for normal numbers and one subtraction for subnormal ones.
DDE_FN float from_fp16(uint16_t x) {
  const uint32_t w = static_cast<uint32_t>(x) << 16, twice = w + w;
  const float normal = from_bits((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = from_bits((twice >> 17) | (126u << 23)) - 0.5f;
  return from_bits((w & 0x80000000u) | to_bits(twice < (1u << 27) ? subnormal : normal));
}

// Adding a power of two of the right size makes the float unit round where fp16 ends.
DDE_FN uint16_t to_fp16(float x) {
  const uint32_t w = to_bits(x), twice = w + w, sign = w & 0x80000000u;
  const float scaled = (from_bits(w & 0x7FFFFFFFu) * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = to_bits(from_bits((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

template <class A>
DDE_FN void widen_fp16(const uint16_t* x, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_fp16(x[i]);
}

DDE_FN void narrow_fp16(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < n; ++i) out[i] = to_fp16(x[i]);
}

#ifdef __F16C__
template <>
inline __attribute__((always_inline)) void widen_fp16(const uint16_t* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) out[i] = from_fp16(x[i]);
}
#endif

// n elements of A from `begin` of a sample's row: in place where they are A already and whole
// lanes, else in `buffer`, filled up with zeros to whole lanes.
template <class A>
DDE_FN const A* widen(const Rows& x, int64_t sample, int64_t n_row, int64_t begin, int64_t n,
                      A* buffer) {
  const int64_t at = row_of(x, sample) * n_row + begin;
  const bool whole = n % LANES == 0;
  if (x.dtype == F32) {
    const float* p = static_cast<const float*>(x.data) + at;
    if (sizeof(A) == 4 && whole) return reinterpret_cast<const A*>(p);
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(p[i]);
  } else if (x.dtype == F64) {
    const double* p = static_cast<const double*>(x.data) + at;
    if (sizeof(A) == 8 && whole) return reinterpret_cast<const A*>(p);
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(p[i]);
  } else if (x.dtype == BF16) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bf16(p[i]);
  } else {
    widen_fp16(static_cast<const uint16_t*>(x.data) + at, buffer, n);
  }
  for (int64_t i = n; i % LANES; ++i) buffer[i] = 0;
  return buffer;
}

// n numbers into `data` from element `at` on; double goes to 16 bits through float, as in torch
template <class A>
DDE_FN void narrow(const A* x, void* data, DType dtype, int64_t at, int64_t n) {
  if (dtype == F32) {
    float* p = static_cast<float*>(data) + at;
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(x[i]);
  } else if (dtype == F64) {
    double* p = static_cast<double*>(data) + at;
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(data) + at;
    float rounded[BLOCK];
    const float* f = reinterpret_cast<const float*>(x);
    if (sizeof(A) == 8) {
      for (int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(x[i]);
      f = rounded;
    }
    if (dtype == F16) {
      narrow_fp16(f, p, n);
    } else {
      for (int64_t i = 0; i < n; ++i) p[i] = to_bf16(f[i]);
    }
  }
}

}  // namespace dde_fast
