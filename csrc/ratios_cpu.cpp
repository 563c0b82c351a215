// The ratio table on the CPU: plain loops, for the table is tiny.

#include "tensors.h"

namespace dde_fast {

void observe_ratios_cpu(Tensor sums,             // float64 [5, T]
                        Tensor policy_error,     // [2B]
                        Tensor reference_error,  // [2B]
                        Tensor timesteps,        // int64 [B] or [2B]
                        Tensor scale) {          // [T]
  const Observations a = observations_of(sums, policy_error, reference_error, timesteps, scale);
  for (int64_t pair = 0; pair < a.pairs; ++pair) {
    const int64_t t = a.timesteps[pair];
    double e[4];
    if (t < 0 || t >= a.steps || !errors_of(a, pair, e)) continue;
    for (int64_t row = 0; row < 4; ++row) a.sums[row * a.steps + t] += element(a.scale, t) * e[row];
    a.sums[4 * a.steps + t] += 1;
  }
}

void update_ratios_cpu(Tensor ratios,   // float32 [4, T]
                       Tensor margins,  // float32 [T]
                       Tensor sums,     // float64 [5, T]
                       double decay) {
  const Table a = table_of(ratios, margins, sums, decay);
  double later = 0;  // Σ_{j>t} Δr_j
  for (int64_t t = a.steps - 1; t >= 0; --t) {
    a.margins[t] = static_cast<float>(later);
    later += update_step(a, t);
  }
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CPU, m) {
  m.impl("observe_ratios", TORCH_BOX(&dde_fast::observe_ratios_cpu));
  m.impl("update_ratios", TORCH_BOX(&dde_fast::update_ratios_cpu));
}
