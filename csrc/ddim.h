// The DDIM step's maths, shared by CPU and CUDA; the formulas are dde_fast/reference.py's.
// Build without contraction: each operation is then rounded once, in eager PyTorch's order.
#pragma once

#include <math.h>
#include <stdint.h>

#include "rows.h"

namespace dde_fast {

// numbered as in dde_fast/compiled.py
enum Prediction : int64_t { EPSILON = 0, V_PREDICTION = 1, SAMPLE = 2 };

// What both directions read. Candidate k of row b is row k·B + b.
struct Step {
  Rows prediction, sample;    // [B]
  Rows candidates;            // [K·B], noise or next samples
  const float* coefficients;  // [B, 5]
  int64_t type;               // Prediction
  int64_t batch, count, n;    // B, K, N
  bool wide;                  // in fp64
};

// a row of the coefficients: √ᾱ_t, √(1-ᾱ_t), √ᾱ_prev, √(1-ᾱ_prev-σ²), σ
template <class A>
struct StepRow {
  A a, b, a_prev, direction, sigma;
};

template <class A>
DDE_FN StepRow<A> step_row(const Step& step, int64_t row) {
  const float* x = step.coefficients + 5 * row;
  return {x[0], x[1], x[2], x[3], x[4]};
}

template <int64_t TYPE, class A>
DDE_FN A mean_of(const StepRow<A>& k, A x, A o) {
  A denoised, epsilon;
  if (TYPE == EPSILON) {
    denoised = (x - k.b * o) / k.a, epsilon = o;
  } else if (TYPE == V_PREDICTION) {
    denoised = k.a * x - k.b * o, epsilon = k.a * o + k.b * x;
  } else {
    denoised = o, epsilon = (x - k.a * o) / k.b;
  }
  return k.a_prev * denoised + k.direction * epsilon;
}

template <int64_t TYPE, class A>
DDE_FN void means_of(const StepRow<A>& k, const A* x, const A* o, A* mean, int64_t n) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int64_t i = 0; i < n; ++i) mean[i] = mean_of<TYPE>(k, x[i], o[i]);
}

// μ of n elements
template <class A>
DDE_FN void means(int64_t type, const StepRow<A>& k, const A* x, const A* o, A* mean, int64_t n) {
  if (type == EPSILON) {
    means_of<EPSILON>(k, x, o, mean, n);
  } else if (type == V_PREDICTION) {
    means_of<V_PREDICTION>(k, x, o, mean, n);
  } else {
    means_of<SAMPLE>(k, x, o, mean, n);
  }
}

// d μ / d o; in double, for its two terms nearly cancel
DDE_FN double slope_of(const Step& step, int64_t row) {
  const double x = 0, o = 1;
  double slope;
  means(step.type, step_row<double>(step, row), &x, &o, &slope, 1);
  return slope;
}

// log-density per element, from the sum of (next - μ)²; a deterministic step has none
DDE_FN double log_density(double squares, double sigma, int64_t n) {
  if (!(sigma > 0)) return nan("");
  const double half_log_2pi = 0.91893853320467274178;
  return -squares / (2 * sigma * sigma * static_cast<double>(n)) - log(sigma) - half_log_2pi;
}

// d loss / d log_prob · 1/(σ²N): what (next - μ) is multiplied by. Nothing passes a deterministic
// step, but a NaN stays one.
DDE_FN double density_factor(double grad_log_prob, double sigma, int64_t n) {
  return sigma > 0 ? grad_log_prob / (sigma * sigma * static_cast<double>(n)) : 0 * grad_log_prob;
}

}  // namespace dde_fast
