// The ratio table, shared by CPU and CUDA; the formulas are dde_fast/ratios.py's. All in double.
#pragma once

#include <math.h>

#include "rows.h"

namespace dde_fast {

// A batch's errors and where its observations go.
struct Observations {
  double* sums;                              // [5, T]
  Column policy_error, reference_error;      // [2B]
  const int64_t* timesteps;                  // [B], or the first half of [2B]
  Column scale;                              // [T], ½ g_t² k_t²
  int64_t pairs, steps;
};

// e of policy winner, policy loser, reference winner, reference loser; false if any is not finite
DDE_FN bool errors_of(const Observations& a, int64_t pair, double e[4]) {
  e[0] = element(a.policy_error, pair);
  e[1] = element(a.policy_error, a.pairs + pair);
  e[2] = element(a.reference_error, pair);
  e[3] = element(a.reference_error, a.pairs + pair);
  for (int row = 0; row < 4; ++row) {
    if (!(fabs(e[row]) < HUGE_VAL)) return false;
  }
  return true;
}

struct Table {
  float *ratios, *margins;  // [4, T] and [T]
  double* sums;             // [5, T]
  double decay;
  int64_t steps;
};

// Folds the sums at t into the table and empties them; Δr_t of the new table, as it was rounded.
DDE_FN double update_step(const Table& a, int64_t t) {
  const double count = a.sums[4 * a.steps + t];
  double r[4];
  for (int row = 0; row < 4; ++row) {
    const int64_t at = row * a.steps + t;
    if (count > 0) {
      const double old = a.ratios[at];
      a.ratios[at] = static_cast<float>(a.decay * old + (1 - a.decay) * (a.sums[at] / count));
    }
    r[row] = a.ratios[at];
    a.sums[at] = 0;
  }
  a.sums[4 * a.steps + t] = 0;
  return (r[0] - r[2]) - (r[1] - r[3]);
}

}  // namespace dde_fast
