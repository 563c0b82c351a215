// What the CUDA kernels share: vectors of elements, sums over a warp. No torch header:
// tests/cuda_on_cpu compiles the kernels for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "rows.h"

namespace dde_fast {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 8;  // elements of one thread: one 16-byte load in 16 bits, two in fp32
constexpr int TILE = THREADS * VECTOR;

template <class A>
__device__ __forceinline__ A widened(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class A>
__device__ __forceinline__ A widened(__half x) { return __half2float(x); }
template <class A>
__device__ __forceinline__ A widened(float x) { return x; }
template <class A>
__device__ __forceinline__ A widened(double x) { return static_cast<A>(x); }

// double goes to 16 bits through float, as in torch
template <class E, class A>
__device__ __forceinline__ E narrowed(A x) { return static_cast<E>(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}
template <>
__device__ __forceinline__ __half narrowed(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __half narrowed(double x) {
  return __float2half_rn(static_cast<float>(x));
}

// VECTOR elements moved 16 bytes at a time
template <class E>
struct alignas(16) Pack {
  E elements[VECTOR];
};

// CONSTANT: nothing writes there during the launch
template <class E, bool CONSTANT = true>
__device__ __forceinline__ Pack<E> load_pack(const void* data, int64_t at) {
  union {
    uint4 words[sizeof(Pack<E>) / 16];
    Pack<E> pack;
  } u{};
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const E*>(data) + at);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Pack<E>) / 16); ++i) {
    u.words[i] = CONSTANT ? __ldg(from + i) : __ldcg(from + i);
  }
  return u.pack;
}

template <class E>
__device__ __forceinline__ void store_pack(void* data, int64_t at, const Pack<E>& pack) {
  union {
    Pack<E> pack;
    uint4 words[sizeof(Pack<E>) / 16];
  } u{pack};
  uint4* to = reinterpret_cast<uint4*>(static_cast<E*>(data) + at);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Pack<E>) / 16); ++i) {
    __stwb(to + i, u.words[i]);  // not `=`, which the compiler takes apart into elements again
  }
}

// one element of any dtype: the path for any alignment and any mix
template <class A>
__device__ __forceinline__ A load_any(const Rows& x, int64_t at) {
  switch (x.dtype) {
    case F32:
      return widened<A>(static_cast<const float*>(x.data)[at]);
    case F64:
      return widened<A>(static_cast<const double*>(x.data)[at]);
    case F16:
      return widened<A>(static_cast<const __half*>(x.data)[at]);
    default:
      return widened<A>(static_cast<const __nv_bfloat16*>(x.data)[at]);
  }
}

template <class A>
__device__ __forceinline__ void store_any(void* data, DType dtype, int64_t at, A x) {
  switch (dtype) {
    case F32:
      static_cast<float*>(data)[at] = narrowed<float>(x);
      break;
    case F64:
      static_cast<double*>(data)[at] = narrowed<double>(x);
      break;
    case F16:
      static_cast<__half*>(data)[at] = narrowed<__half>(x);
      break;
    default:
      static_cast<__nv_bfloat16*>(data)[at] = narrowed<__nv_bfloat16>(x);
  }
}

// sum over a warp in a fixed order; every lane gets it
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

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

}  // namespace dde_fast
