// Sums kept side by side in the CPU loops: LANES of them in vectors of DDE_FAST_VECTOR bytes, added
// up in one order, so that the width of an instruction set changes no bit.
#pragma once

#include "cpu.h"

#ifdef __SSE2__
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace dde_fast {
namespace DDE_FAST_ISA {
namespace {

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(DDE_FAST_VECTOR)));
  typedef float Unaligned __attribute__((vector_size(DDE_FAST_VECTOR), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(DDE_FAST_VECTOR)));
  typedef double Unaligned __attribute__((vector_size(DDE_FAST_VECTOR), aligned(8), may_alias));
};

template <class A>
DDE_FN typename Vector<A>::Type load_vector(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::Unaligned*>(p);
}

// a · b + c, rounded once where the set can
#if DDE_FAST_VECTOR == 64
DDE_FN Vector<float>::Type fused(Vector<float>::Type a, Vector<float>::Type b,
                                 Vector<float>::Type c) {
  return (Vector<float>::Type)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
DDE_FN Vector<double>::Type fused(Vector<double>::Type a, Vector<double>::Type b,
                                  Vector<double>::Type c) {
  return (Vector<double>::Type)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif DDE_FAST_VECTOR == 32
DDE_FN Vector<float>::Type fused(Vector<float>::Type a, Vector<float>::Type b,
                                 Vector<float>::Type c) {
  return (Vector<float>::Type)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
DDE_FN Vector<double>::Type fused(Vector<double>::Type a, Vector<double>::Type b,
                                  Vector<double>::Type c) {
  return (Vector<double>::Type)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
DDE_FN Vector<float>::Type fused(Vector<float>::Type a, Vector<float>::Type b,
                                 Vector<float>::Type c) {
  return (Vector<float>::Type)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
DDE_FN Vector<double>::Type fused(Vector<double>::Type a, Vector<double>::Type b,
                                  Vector<double>::Type c) {
  return (Vector<double>::Type)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
DDE_FN V fused(const V& a, const V& b, const V& c) {
  return a * b + c;
}
#endif

// bf16 two at a time, as the halves of 32-bit words: widened by a shift and a mask, without shuffles
typedef uint32_t Words __attribute__((vector_size(DDE_FAST_VECTOR)));
typedef uint32_t UnalignedWords
    __attribute__((vector_size(DDE_FAST_VECTOR), aligned(2), may_alias));
typedef Vector<float>::Type Floats;

DDE_FN Words load_words(const uint16_t* p) { return *reinterpret_cast<const UnalignedWords*>(p); }
DDE_FN Floats even(const Words& x) { return (Floats)(x << 16); }
DDE_FN Floats odd(const Words& x) { return (Floats)(x & 0xFFFF0000u); }

// Rounded to bf16 in the high halves, nearest even. A NaN must have nothing in its low half, as those
// of bf16 and the default one; it then stays as it is.
DDE_FN Words rounded(const Floats& x) {
  const Words u = (Words)x;
  return u + 0x7FFFu + ((u >> 16) & 1u);
}

#ifdef __AVX512BF16__
// The set's own conversion: as `rounded`, but for bf16's subnormal numbers (below 1.2e-38), which become
// zero. It puts the odd ones behind the even ones; a shuffle lets them take turns.
DDE_FN Words narrowed(const Floats& even, const Floats& odd) {
  const Words turns = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005,
                       0x160006, 0x170007, 0x180008, 0x190009, 0x1A000A, 0x1B000B,
                       0x1C000C, 0x1D000D, 0x1E000E, 0x1F000F};
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Words)_mm512_permutexvar_epi16((__m512i)turns, (__m512i)halves);
}
#else
DDE_FN Words narrowed(const Floats& even, const Floats& odd) {
  return (rounded(even) >> 16) | (rounded(odd) & 0xFFFF0000u);
}
#endif

// to a whole vector's address; STREAM: around the caches, which would read the line first
template <bool STREAM>
DDE_FN void store_vector(const Floats& x, void* p) {
#if DDE_FAST_VECTOR == 64
  if (STREAM) return _mm512_stream_ps(static_cast<float*>(p), (__m512)x);
#elif DDE_FAST_VECTOR == 32
  if (STREAM) return _mm256_stream_ps(static_cast<float*>(p), (__m256)x);
#elif defined(__SSE2__)
  if (STREAM) return _mm_stream_ps(static_cast<float*>(p), (__m128)x);
#endif
  *static_cast<Vector<float>::Unaligned*>(p) = x;
}

// before another thread may read what was streamed
DDE_FN void finish_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// lanes in order, in double
template <class A, int64_t COUNT>
double total(const typename Vector<A>::Type (&lanes)[COUNT]) {
  double sum = 0;
  for (int64_t k = 0; k < COUNT; ++k) {
    for (int64_t i = 0; i < LANES / COUNT; ++i) sum += static_cast<double>(lanes[k][i]);
  }
  return sum;
}

}  // namespace
}  // namespace DDE_FAST_ISA
}  // namespace dde_fast
