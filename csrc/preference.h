// The loss head's scalar maths, shared by CPU and CUDA: links, slopes, one pair's logit.
// The formulas are dde_fast/reference.py's; no torch header here.
#pragma once

#include <math.h>
#include <stdint.h>

#include "rows.h"

namespace dde_fast {

// numbered as in dde_fast/compiled.py
enum Link : int64_t { SIGMOID = 0, IPO = 1, HINGE = 2, LINEAR = 3 };

// What the loss is made of besides tensors.
struct Objective {
  int64_t link;
  double beta, lose_weight, label_smoothing;
};

// loss of one pair; a NaN stays one in every link
template <class T>
DDE_FN T link_loss(T z, const Objective& f) {
  const T beta = static_cast<T>(f.beta), s = static_cast<T>(f.label_smoothing);
  if (f.link == SIGMOID) {
    // -(1-s)·logσ(z) - s·logσ(-z), both through log(1 + exp(-|z|))
    return log1p(exp(-fabs(z))) + (z < 0 ? -(1 - s) * z : s * z);
  }
  if (f.link == IPO) {
    const T distance = z / beta - static_cast<T>(0.5) / beta;
    return distance * distance;
  }
  if (f.link == HINGE) return z >= 1 ? static_cast<T>(0) : 1 - z;
  return -z;
}

// d loss / d z of one pair
template <class T>
DDE_FN T link_slope(T z, const Objective& f) {
  const T beta = static_cast<T>(f.beta), s = static_cast<T>(f.label_smoothing);
  if (f.link == SIGMOID) {
    const T e = exp(-fabs(z));
    const T low = e / (1 + e), high = 1 / (1 + e);  // σ(-|z|), σ(|z|)
    return z >= 0 ? s * high - (1 - s) * low : s * low - (1 - s) * high;
  }
  if (f.link == IPO) return 2 * (z / beta - static_cast<T>(0.5) / beta) / beta;
  if (f.link == HINGE) return (z >= 1 ? static_cast<T>(0) : static_cast<T>(-1)) + 0 * z;
  return 0 * z - 1;
}

// The tables and timesteps from which every pair takes its weight and margin.
struct Schedule {
  const int64_t* timesteps;  // [B], or [2B] if halves
  Column weights, margins;   // [T]; margins unread in backward
  int64_t steps;             // T
  bool halves;
};

// A pair's timestep, clamped so that it may index the tables.
DDE_FN int64_t timestep_of(const Schedule& schedule, int64_t pair) {
  const int64_t t = schedule.timesteps[pair];
  return t < 0 ? 0 : t >= schedule.steps ? schedule.steps - 1 : t;
}

// in range and, where both halves were given, equal in both
DDE_FN bool timestep_is_valid(const Schedule& schedule, int64_t pair, int64_t pairs) {
  const int64_t t = schedule.timesteps[pair];
  return t >= 0 && t < schedule.steps && (!schedule.halves || t == schedule.timesteps[pair + pairs]);
}

// √ᾱ_t and √(1-ᾱ_t), with ᾱ in the place of the weights; NaN where the timestep is not valid
DDE_FN void noise_coefficients(const Schedule& schedule, int64_t pair, int64_t pairs, float& signal,
                               float& sigma) {
  const bool valid = timestep_is_valid(schedule, pair, pairs);
  const double abar = valid ? element(schedule.weights, timestep_of(schedule, pair)) : nan("");
  signal = static_cast<float>(sqrt(abar));
  sigma = static_cast<float>(sqrt(1 - abar));
}

// -beta·ω_t·(d_w - a_l·d_l) + beta·m_t; NaN where the timestep is not valid
DDE_FN double logit_of(const Schedule& schedule, const Objective& f, int64_t pair, int64_t pairs,
                       double d_winner, double d_loser) {
  if (!timestep_is_valid(schedule, pair, pairs)) return nan("");
  const int64_t t = timestep_of(schedule, pair);
  return -f.beta * element(schedule.weights, t) * (d_winner - f.lose_weight * d_loser) +
         f.beta * element(schedule.margins, t);
}

// What arrives at one sample: gradients of the loss, its pair's logit and its policy error.
template <class T>
struct Incoming {
  T loss, logit, policy_error;
  bool has_loss;  // without it no slope is formed: the slope of a NaN logit would be one
};

// 2/N · d loss / d e of the winner (half 0) or the loser (half 1) of a pair
template <class T>
DDE_FN T gradient_factor(const Schedule& schedule, const Objective& f, const Incoming<T>& incoming,
                         T logit, int64_t pair, int64_t half, int64_t pairs, int64_t n) {
  T at_logit = incoming.logit;
  if (incoming.has_loss) at_logit += incoming.loss * link_slope(logit, f) / static_cast<T>(pairs);
  const T weight = static_cast<T>(element(schedule.weights, timestep_of(schedule, pair)));
  T at_error = -static_cast<T>(f.beta) * weight * at_logit;
  if (half) at_error = -static_cast<T>(f.lose_weight) * at_error;
  return 2 * (at_error + incoming.policy_error) / static_cast<T>(n);
}

}  // namespace dde_fast
