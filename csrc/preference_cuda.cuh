// What the loss head's CUDA ops share: their checks, and the launchers for any device.
#pragma once

#include <atomic>
#include <random>

#include "cuda.cuh"
#include "preference_kernels.cuh"

namespace dde_fast {

// the forward's tensors, all on the device of policy
inline void check_devices(const Tensor& policy, const OptionalTensor& reference,
                          const Tensor& target, const Tensor& timesteps, const Tensor& weights,
                          const Tensor& margins) {
  if (reference) check_device(*reference, policy, "reference");
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

// A nonce for each launch (see Ticket): multiples of 2⁶⁴/φ, of which no billion come within a
// batch of each other, so memory that an earlier launch counted in is no obstacle. Each process
// begins elsewhere, should memory come from another one.
inline unsigned long long next_nonce() {
  static std::atomic<unsigned long long> last{std::random_device()() * 0x100000001ull};
  return last += 0x9E3779B97F4A7C15ull;
}

// memory to count in, and what a launch counts from
struct Count {
  Tensor memory;
  Ticket ticket;

  Count(const Forward& f, int64_t counts)  // of 8 bytes
      : memory(empty_like_of(f.logits, counts, true)),
        ticket{static_cast<unsigned long long*>(memory.data_ptr()), next_nonce()} {}
};

// fills the outputs of the forward, in one launch
void launch_forward(const Forward& f, cudaStream_t stream);

// fills a.gradient, in one launch; A is double if any input is
template <class A>
void launch_gradient(const Gradient<A>& a, cudaStream_t stream);

}  // namespace dde_fast
