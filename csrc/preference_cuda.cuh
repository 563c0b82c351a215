// What the loss head's CUDA ops share: their checks, and the launchers for any device.
#pragma once

#include "cuda.cuh"
#include "preference_kernels.cuh"

namespace dde_fast {

// the forward's tensors, all on the device of policy
inline void check_devices(const Tensor& policy, const OptionalTensor& reference,
                          const OptionalTensor& errors, const Tensor& target,
                          const Tensor& timesteps, const Tensor& weights, const Tensor& margins) {
  if (reference) check_device(*reference, policy, "reference");
  if (errors) check_device(*errors, policy, "reference");
  check_device(target, policy, "target");
  check_device(timesteps, policy, "timesteps");
  check_device(weights, policy, "weights");
  check_device(margins, policy, "margins");
}

inline Inputs inputs_of(const Forward& f) {
  return {f.policy, f.reference, f.target, f.pairs, f.n};
}

inline Finish finish_of(const Forward& f) {
  return {f.schedule,
          f.objective,
          f.errors,
          f.reference.data != nullptr,
          f.loss.data_ptr(),
          f.logits.data_ptr(),
          f.policy_error.data_ptr(),
          f.reference_error.data_ptr(),
          f.margin.data_ptr(),
          f.pairs,
          f.n};
}

// vector kernels may read the predictions: rows aligned, reference in policy's dtype
inline bool is_aligned(const Inputs& a) {
  return is_aligned(a.policy.data) && is_aligned(a.reference.data) && is_aligned(a.target.data) &&
         (!a.reference.data || a.reference.dtype == a.policy.dtype);
}

// fills the outputs of the forward, in two launches
void launch_forward(const Forward& f, cudaStream_t stream);

// fills a.gradient, in one launch; A is double if any input is
template <class A>
void launch_gradient(const Gradient<A>& a, cudaStream_t stream);

}  // namespace dde_fast
