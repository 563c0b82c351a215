// Sums kept side by side in the CPU loops: LANES of them in vectors of DDE_FAST_VECTOR bytes, added
// up in one order, so that every instruction set gives the same bits.
#pragma once

#include "cpu.h"

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
