// The loss head on CUDA (sm_80 and later): one launch forward, one backward. Nothing waits for
// the host, and memory comes from torch, so a CUDA graph can capture it.

#include "preference_cuda.cuh"

namespace dde_fast {
namespace {

constexpr int64_t MAX_CHUNKS = 64;  // partial sums of a row

void launch_errors(const Errors& a, bool wide, cudaStream_t stream) {
  const Inputs& inputs = a.inputs;
  const unsigned blocks = blocks_of(inputs.pairs, a.chunks);
  const bool has = inputs.reference.data;
  const bool done = vectorised(
      inputs.policy.dtype, inputs.target.dtype, inputs.n, is_aligned(inputs),
      [&](auto acc, auto policy, auto target) {
        using A = decltype(acc);
        using P = decltype(policy);
        using Y = decltype(target);
        has ? errors_kernel<A, P, Y, true><<<blocks, THREADS, 0, stream>>>(a)
            : errors_kernel<A, P, Y, false><<<blocks, THREADS, 0, stream>>>(a);
      });
  if (!done && wide) {
    has ? errors_any_kernel<double, true><<<blocks, THREADS, 0, stream>>>(a)
        : errors_any_kernel<double, false><<<blocks, THREADS, 0, stream>>>(a);
  } else if (!done) {
    has ? errors_any_kernel<float, true><<<blocks, THREADS, 0, stream>>>(a)
        : errors_any_kernel<float, false><<<blocks, THREADS, 0, stream>>>(a);
  }
  check_launch("errors_kernel");
}

}  // namespace

void launch_forward(const Forward& f, cudaStream_t stream) {
  const int64_t part = (f.n + MAX_CHUNKS - 1) / MAX_CHUNKS;
  const int64_t chunk = (part + TILE - 1) / TILE * TILE, chunks = (f.n + chunk - 1) / chunk;
  const Tensor partial = empty_like_of(f.logits, 3 * 2 * f.pairs * chunks, f.wide);
  const Count count(f, 1 + f.pairs);
  launch_errors({inputs_of(f), partial.data_ptr(), chunk, chunks, finish_of(f), count.ticket},
                f.wide, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_cuda(
    Tensor policy,             // [2B, C, H, W], or [B, C, H, W] shared by the pair
    OptionalTensor reference,  // as policy, or its errors [2B]
    Tensor target,             // [2B, C, H, W] or [B, C, H, W]
    Tensor timesteps,          // int64 [B] or [2B]
    Tensor weights,            // [T]
    Tensor margins,            // [T]
    double beta, double lose_weight, int64_t link, double label_smoothing) {
  check_devices(policy, reference, target, timesteps, weights, margins);
  const torch::stable::accelerator::DeviceGuard guard(policy.get_device_index());
  const Forward f = forward_of(policy, reference, target, timesteps, weights, margins,
                               {link, beta, lose_weight, label_smoothing});
  launch_forward(f, current_stream(policy));
  return f.outputs();
}

template <class A>
void launch_gradient(const Gradient<A>& a, cudaStream_t stream) {
  const unsigned blocks = blocks_of(a.pairs, a.tiles);
  const bool aligned =
      is_aligned(a.policy.data) && is_aligned(a.target.data) && is_aligned(a.gradient);
  const bool done = vectorised(
      a.policy.dtype, a.target.dtype, a.n, aligned, [&](auto acc, auto policy, auto target) {
        using P = decltype(policy);
        using Y = decltype(target);
        if constexpr (sizeof(A) == sizeof(acc)) {
          gradient_kernel<A, P, Y><<<blocks, THREADS, 0, stream>>>(a);
        } else {
          gradient_any_kernel<A><<<blocks, THREADS, 0, stream>>>(a);
        }
      });
  if (!done) gradient_any_kernel<A><<<blocks, THREADS, 0, stream>>>(a);
  check_launch("gradient_kernel");
}

template void launch_gradient(const Gradient<float>&, cudaStream_t);
template void launch_gradient(const Gradient<double>&, cudaStream_t);

void preference_loss_backward_cuda(Tensor gradient,                   // as policy
                                   OptionalTensor grad_loss,          // []
                                   OptionalTensor grad_logits,        // [B]
                                   OptionalTensor grad_policy_error,  // [2B]
                                   Tensor policy,     // [2B, C, H, W] or [B, C, H, W]
                                   Tensor target,     // [2B, C, H, W] or [B, C, H, W]
                                   Tensor timesteps,  // int64 [B] or [2B]
                                   Tensor logits,     // [B]
                                   Tensor weights,    // [T]
                                   double beta, double lose_weight, int64_t link,
                                   double label_smoothing) {
  const int64_t pairs = logits.numel(), n = policy.numel() / policy.size(0);
  for (const Tensor* x : {&gradient, &target, &timesteps, &logits, &weights}) {
    check_device(*x, policy, "preference_loss_backward");
  }
  for (const OptionalTensor* x : {&grad_loss, &grad_logits, &grad_policy_error}) {
    if (*x) check_device(**x, policy, "preference_loss_backward");
  }
  const torch::stable::accelerator::DeviceGuard guard(policy.get_device_index());
  const Rows o = rows_of(policy, pairs, n, "policy"), y = rows_of(target, pairs, n, "target");
  void* g = gradient_of(gradient, o, pairs, n);
  const ScalarType dtype = logits.scalar_type();
  const bool wide = column_of(logits, pairs, "logits").wide;
  STD_TORCH_CHECK(wide || (o.dtype != F64 && y.dtype != F64), "logits: expected float64");
  const auto launch = [&](auto acc) {
    using A = decltype(acc);
    launch_gradient<A>({o, y, g, schedule_of(timesteps, weights, nullptr, pairs),
                        {link, beta, lose_weight, label_smoothing}, grad_loss.has_value(),
                        optional_data<A>(grad_loss, 1, dtype, "grad_loss"),
                        optional_data<A>(grad_logits, pairs, dtype, "grad_logits"),
                        optional_data<A>(grad_policy_error, 2 * pairs, dtype, "grad_policy_error"),
                        static_cast<const A*>(logits.data_ptr()), pairs, n, (n + TILE - 1) / TILE},
                       current_stream(policy));
  };
  wide ? launch(0.0) : launch(0.0f);
}

namespace {

template <class E, class A>
void launch_scale(const Rows& gradient, void* data, const Column& factor, cudaStream_t stream) {
  // no more blocks than run at once, so that a factor of 1 is found soon
  const int64_t tiles = (gradient.rows + TILE - 1) / TILE;
  const unsigned blocks = static_cast<unsigned>(tiles < 2048 ? tiles : 2048);
  scale_kernel<E, A><<<blocks, THREADS, 0, stream>>>(static_cast<E*>(data), gradient.rows, factor);
  check_launch("scale_kernel");
}

}  // namespace

void scale_gradient_cuda(Tensor gradient,  // any shape, dense
                         Tensor factor) {  // []
  check_device(factor, gradient, "factor");
  const Rows g = elements_of(gradient, "gradient");
  const Column by = column_of(factor, 1, "factor");
  if (g.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
  const cudaStream_t stream = current_stream(gradient);
  void* data = gradient.data_ptr();
  if (g.dtype == F64) return launch_scale<double, double>(g, data, by, stream);
  if (g.dtype == F32) return launch_scale<float, float>(g, data, by, stream);
  if (g.dtype == F16) return launch_scale<__half, float>(g, data, by, stream);
  launch_scale<__nv_bfloat16, float>(g, data, by, stream);
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CUDA, m) {
  m.impl("preference_loss", TORCH_BOX(&dde_fast::preference_loss_cuda));
  m.impl("preference_loss_backward", TORCH_BOX(&dde_fast::preference_loss_backward_cuda));
  m.impl("scale_gradient", TORCH_BOX(&dde_fast::scale_gradient_cuda));
}
