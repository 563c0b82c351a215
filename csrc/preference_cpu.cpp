// The loss head on the CPU: threads over (pair, chunk), then one pass over pairs in a fixed order.
// The loops themselves are preference_loops.cpp's.

#include <memory>

#include "cpu_convert.h"
#include "cpu_threads.h"
#include "pages.h"
#include "tensors.h"

namespace dde_fast {
namespace {

// mean over a row from its chunks' sums, in order
double mean_of_chunks(const double* partial, int64_t chunks, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < chunks; ++i) sum += partial[i];
  return sum / static_cast<double>(n);
}

// Where a forward's results go.
template <class T>
struct Results {
  T *loss, *logits, *policy_error, *reference_error, *margin;

  explicit Results(const Forward& f)
      : loss(static_cast<T*>(f.loss.data_ptr())),
        logits(static_cast<T*>(f.logits.data_ptr())),
        policy_error(static_cast<T*>(f.policy_error.data_ptr())),
        reference_error(static_cast<T*>(f.reference_error.data_ptr())),
        margin(static_cast<T*>(f.margin.data_ptr())) {}
};

// A pair's errors, logit and margin from its chunks' sums [3, 2B, chunks].
template <class T>
void finish_pair(const Forward& f, const double* partial, int64_t chunks, int64_t pair,
                 const Results<T>& out) {
  const int64_t rows = 2 * f.pairs;
  double d[2];
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t row = pair + half * f.pairs;
    const double e = mean_of_chunks(partial + row * chunks, chunks, f.n);
    out.policy_error[row] = static_cast<T>(e);
    d[half] = e;
    if (f.reference.data) {
      const double e_reference = mean_of_chunks(partial + (rows + row) * chunks, chunks, f.n);
      out.reference_error[row] = static_cast<T>(e_reference);
      d[half] = mean_of_chunks(partial + (2 * rows + row) * chunks, chunks, f.n);
    } else if (f.errors.data) {
      out.reference_error[row] = static_cast<T>(element(f.errors, row));
      d[half] = e - out.reference_error[row];
    }
  }
  out.logits[pair] = static_cast<T>(logit_of(f.schedule, f.objective, pair, f.pairs, d[0], d[1]));
  out.margin[pair] = static_cast<T>(element(f.schedule.margins, timestep_of(f.schedule, pair)));
}

// The pairs' mean loss, about the first pair's: exact when all are equal, so log 2 stays log 2.
template <class T>
void finish_loss(const Forward& f, const Results<T>& out) {
  const double first = link_loss(static_cast<double>(out.logits[0]), f.objective);
  double sum = 0;
  for (int64_t pair = 1; pair < f.pairs; ++pair) {
    sum += link_loss(static_cast<double>(out.logits[pair]), f.objective) - first;
  }
  *out.loss = static_cast<T>(first + sum / static_cast<double>(f.pairs));
}

template <class T>
void forward(const Forward& f) {
  const int64_t chunks = chunks_of(f.n);
  const std::unique_ptr<double[]> partial(new double[6 * f.pairs * chunks]);
  const ErrorsTask task{f.policy, f.reference, f.target, f.pairs, f.n, chunks, f.wide,
                        partial.get()};
  run(loops().errors, &task, f.pairs * chunks);
  const Results<T> out(f);
  for (int64_t pair = 0; pair < f.pairs; ++pair) finish_pair(f, partial.get(), chunks, pair, out);
  finish_loss(f, out);
}

// whether a gradient is better written around the caches: larger than them, in whole lines
bool is_streamed(const void* gradient, const Rows& policy, int64_t n) {
  const int64_t row = n * bytes_of(policy.dtype);
  return policy.rows * row >= LARGE_BYTES && row % 64 == 0 &&
         reinterpret_cast<uintptr_t>(gradient) % 64 == 0;
}

// Forward, and d loss / d policy. A thread takes whole pairs, so that the gradient finds in its
// cache what the errors left there; with too few pairs for that, all threads share each.
template <class T>
void forward_with_gradient(const Forward& f, void* gradient) {
  const int64_t chunks = chunks_of(f.n);
  const std::unique_ptr<double[]> partial(new double[6 * f.pairs * chunks]);
  const std::unique_ptr<double[]> factors(new double[2 * f.pairs]);
  const ErrorsTask errors{f.policy, f.reference, f.target, f.pairs, f.n, chunks, f.wide,
                          partial.get()};
  const GradientTask task{f.policy, f.target, gradient, f.pairs, f.n, chunks, f.wide,
                          is_streamed(gradient, f.policy, f.n), factors.get()};
  const Results<T> out(f);
  const auto finish = [&](int64_t pair) {
    finish_pair(f, partial.get(), chunks, pair, out);
    const double z = static_cast<double>(out.logits[pair]);
    for (int64_t half = 0; half < 2; ++half) {
      factors[half * f.pairs + pair] = gradient_factor(
          f.schedule, f.objective, Incoming<double>{1, 0, 0, true}, z, pair, half, f.pairs, f.n);
    }
  };
  if (f.pairs >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    const int64_t grain = (GRAIN + chunks - 1) / chunks;
    torch::stable::parallel_for(0, f.pairs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        loops().errors(&errors, pair * chunks, (pair + 1) * chunks);
        finish(pair);
        loops().gradient(&task, pair * chunks, (pair + 1) * chunks);
      }
    });
  } else {
    run(loops().errors, &errors, f.pairs * chunks);
    for (int64_t pair = 0; pair < f.pairs; ++pair) finish(pair);
    run(loops().gradient, &task, f.pairs * chunks);
  }
  finish_loss(f, out);
}

// where the gradient goes, about to be written
void* gradient_data(const Tensor& gradient, const Rows& policy, int64_t pairs, int64_t n) {
  void* data = gradient_of(gradient, policy, pairs, n);
  prefer_huge_pages(data, policy.rows * n * bytes_of(policy.dtype));
  return data;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_cpu(
    Tensor policy,             // [2B, C, H, W], or [B, C, H, W] shared by the pair
    OptionalTensor reference,  // as policy, or its errors [2B]
    Tensor target,             // [2B, C, H, W] or [B, C, H, W]
    Tensor timesteps,          // int64 [B] or [2B]
    Tensor weights,            // [T]
    Tensor margins,            // [T]
    double beta, double lose_weight, int64_t link, double label_smoothing) {
  const Forward f = forward_of(policy, reference, target, timesteps, weights, margins,
                               {link, beta, lose_weight, label_smoothing});
  f.wide ? forward<double>(f) : forward<float>(f);
  return f.outputs();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_with_gradient_cpu(
    Tensor gradient,           // as policy
    Tensor policy,             // [2B, C, H, W], or [B, C, H, W] shared by the pair
    OptionalTensor reference,  // as policy, or its errors [2B]
    Tensor target,             // [2B, C, H, W] or [B, C, H, W]
    Tensor timesteps,          // int64 [B] or [2B]
    Tensor weights,            // [T]
    Tensor margins,            // [T]
    double beta, double lose_weight, int64_t link, double label_smoothing) {
  const Forward f = forward_of(policy, reference, target, timesteps, weights, margins,
                               {link, beta, lose_weight, label_smoothing});
  const Tensor out = f.in_order(gradient);
  void* g = gradient_data(out, f.policy, f.pairs, f.n);
  f.wide ? forward_with_gradient<double>(f, g) : forward_with_gradient<float>(f, g);
  if (out.get() != gradient.get()) torch::stable::copy_(gradient, out);
  return f.outputs();
}

namespace {

template <class T>
void factors_of(const Schedule& schedule, const Objective& objective,
                const OptionalTensor& grad_loss, const OptionalTensor& grad_logits,
                const OptionalTensor& grad_policy_error, const Tensor& logits, int64_t n,
                double* factors) {
  const ScalarType dtype = logits.scalar_type();
  const int64_t pairs = logits.numel();
  const T* loss = optional_data<T>(grad_loss, 1, dtype, "grad_loss");
  const T* at_logits = optional_data<T>(grad_logits, pairs, dtype, "grad_logits");
  const T* at_error = optional_data<T>(grad_policy_error, 2 * pairs, dtype, "grad_policy_error");
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const double z = static_cast<const T*>(logits.data_ptr())[pair];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = half * pairs + pair;
      const Incoming<double> incoming{loss ? *loss : 0.0, at_logits ? at_logits[pair] : 0.0,
                                      at_error ? at_error[row] : 0.0, loss != nullptr};
      factors[row] = gradient_factor(schedule, objective, incoming, z, pair, half, pairs, n);
    }
  }
}

}  // namespace

void preference_loss_backward_cpu(Tensor gradient,                  // as policy
                                  OptionalTensor grad_loss,         // []
                                  OptionalTensor grad_logits,       // [B]
                                  OptionalTensor grad_policy_error,  // [2B]
                                  Tensor policy,     // [2B, C, H, W] or [B, C, H, W]
                                  Tensor target,     // [2B, C, H, W] or [B, C, H, W]
                                  Tensor timesteps,  // int64 [B] or [2B]
                                  Tensor logits,     // [B]
                                  Tensor weights,    // [T]
                                  double beta, double lose_weight, int64_t link,
                                  double label_smoothing) {
  const int64_t pairs = logits.numel(), n = policy.numel() / policy.size(0);
  const Rows o = rows_of(policy, pairs, n, "policy"), y = rows_of(target, pairs, n, "target");
  void* g = gradient_data(gradient, o, pairs, n);
  const Schedule schedule = schedule_of(timesteps, weights, nullptr, pairs);
  const Objective objective{link, beta, lose_weight, label_smoothing};
  const bool wide_logits = column_of(logits, pairs, "logits").wide;
  const int64_t chunks = chunks_of(n);
  const std::unique_ptr<double[]> factors(new double[2 * pairs]);
  const auto form = wide_logits ? factors_of<double> : factors_of<float>;
  form(schedule, objective, grad_loss, grad_logits, grad_policy_error, logits, n, factors.get());
  const bool wide = wide_logits || o.dtype == F64 || y.dtype == F64;
  const bool stream = is_streamed(g, o, n);
  const GradientTask task{o, y, g, pairs, n, chunks, wide, stream, factors.get()};
  run(loops().gradient, &task, pairs * chunks);
}

namespace {

template <class E, class Times>
void scale(void* data, int64_t n, Times times) {
  E* x = static_cast<E*>(data);
  torch::stable::parallel_for(0, n, GRAIN * CHUNK, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) x[i] = times(x[i]);
  });
}

}  // namespace

// in place; as CUDA's, which can look at the factor without stopping the host
void scale_gradient_cpu(Tensor gradient,  // any shape, dense
                        Tensor factor) {  // []
  const Rows g = elements_of(gradient, "gradient");
  const double wide = element(column_of(factor, 1, "factor"), 0);
  const float by = static_cast<float>(wide);
  if (g.rows == 0 || (g.dtype == F64 ? wide == 1 : by == 1)) return;
  void* data = gradient.data_ptr();
  if (g.dtype == F64) return scale<double>(data, g.rows, [=](double x) { return x * wide; });
  if (g.dtype == F32) return scale<float>(data, g.rows, [=](float x) { return x * by; });
  if (g.dtype == F16) {
    return scale<uint16_t>(data, g.rows, [=](uint16_t x) { return to_fp16(from_fp16(x) * by); });
  }
  scale<uint16_t>(data, g.rows, [=](uint16_t x) { return to_bf16(from_bf16(x) * by); });
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CPU, m) {
  m.impl("preference_loss", TORCH_BOX(&dde_fast::preference_loss_cpu));
  m.impl("preference_loss_with_gradient", TORCH_BOX(&dde_fast::preference_loss_with_gradient_cpu));
  m.impl("preference_loss_backward", TORCH_BOX(&dde_fast::preference_loss_backward_cpu));
  m.impl("scale_gradient", TORCH_BOX(&dde_fast::scale_gradient_cpu));
}
