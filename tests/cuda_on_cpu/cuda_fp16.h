// float16 of the emulated CUDA.
#pragma once

#include "cpu_convert.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return dde_fast::from_fp16(x.bits); }
inline __half __float2half_rn(float x) { return {dde_fast::to_fp16(x)}; }
