// Plain views of tensors that every kernel sees, and the marks of host/device functions.
// No torch header, nothing from std: the per-instruction-set CPU files include this.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define DDE_FN __host__ __device__ __forceinline__
#define DDE_FN_MEMBER static DDE_FN
#else
// always_inline: a copy compiled for AVX-512 must never become the one that every CPU runs
#define DDE_FN static inline __attribute__((always_inline))
#define DDE_FN_MEMBER DDE_FN
#endif

namespace dde_fast {

enum DType : int32_t { F32 = 0, F64 = 1, F16 = 2, BF16 = 3 };

// rows of N elements, one behind the other
struct Rows {
  const void* data;
  int64_t rows;  // 2B, or B where both halves of a pair share a row
  DType dtype;
};

// Where element i of a row lies: at i, or in channels_last at pixel · channels + channel.
struct Layout {
  uint32_t channels;  // 1: at i
  uint32_t space;     // pixels of a channel, unread with one channel
};

DDE_FN int64_t offset(const Layout& layout, int64_t i) {
  if (layout.channels == 1) return i;
  const uint32_t element = static_cast<uint32_t>(i);
  return static_cast<int64_t>(element % layout.space) * layout.channels + element / layout.space;
}

// a row of fp32 or fp64 numbers
struct Column {
  const void* data;
  bool wide;  // fp64
};

DDE_FN double element(const Column& column, int64_t i) {
  return column.wide ? static_cast<const double*>(column.data)[i]
                     : static_cast<const float*>(column.data)[i];
}

DDE_FN int64_t row_of(const Rows& x, int64_t sample) {
  return sample < x.rows ? sample : sample - x.rows;
}

DDE_FN int64_t bytes_of(DType dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

}  // namespace dde_fast
