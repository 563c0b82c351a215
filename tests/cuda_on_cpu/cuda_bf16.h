// bfloat16 of the emulated CUDA.
#pragma once

#include "cpu_convert.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return dde_fast::from_bf16(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {dde_fast::to_bf16(x)}; }
