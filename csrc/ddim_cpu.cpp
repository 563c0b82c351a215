// The DDIM step on the CPU: threads over (row, chunk), then the chunks' sums in a fixed order.
// The loops themselves are ddim_loops.cpp's.

#include <memory>

#include "cpu_threads.h"
#include "tensors.h"

namespace dde_fast {
namespace {

// log-densities of all candidates from their chunks' sums [K·B, chunks]
template <class T>
void finish(const Step& step, const double* partial, int64_t chunks, T* log_prob) {
  for (int64_t i = 0; i < step.batch * step.count; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[i * chunks + chunk];
    const double sigma = step_row<double>(step, i % step.batch).sigma;
    log_prob[i] = static_cast<T>(log_density(sum, sigma, step.n));
  }
}

}  // namespace

void ddim_step_cpu(Tensor log_prob,      // [K·B]
                   OptionalTensor next,  // [K·B, …], dtype of sample; absent: it is given
                   Tensor prediction,    // [B, …]
                   Tensor sample,        // [B, …]
                   Tensor given,         // [K·B, …], the noise; without `next` the next samples
                   Tensor coefficients,  // float32 [B, 5]
                   int64_t prediction_type) {
  const Step step = step_of(prediction, sample, given, coefficients, prediction_type);
  check_vector(log_prob, step.batch * step.count,
               step.wide ? ScalarType::Double : ScalarType::Float, "log_prob");
  const int64_t chunks = chunks_of(step.n);
  const std::unique_ptr<double[]> partial(new double[step.batch * step.count * chunks]);
  const StepTask task{step, next_of(step, next), step.sample.dtype, chunks, partial.get()};
  run(loops().step, &task, step.batch * chunks);
  void* out = log_prob.data_ptr();
  step.wide ? finish(step, partial.get(), chunks, static_cast<double*>(out))
            : finish(step, partial.get(), chunks, static_cast<float*>(out));
}

void ddim_step_backward_cpu(Tensor gradient,               // as prediction
                            OptionalTensor grad_next,      // [K·B, …]
                            OptionalTensor grad_log_prob,  // [K·B]
                            Tensor prediction,             // [B, …]
                            Tensor sample,                 // [B, …]
                            Tensor next,                   // [K·B, …]
                            Tensor coefficients,           // float32 [B, 5]
                            int64_t prediction_type) {
  Step step = step_of(prediction, sample, next, coefficients, prediction_type);
  const StepIncoming incoming = incoming_of(step, gradient, grad_next, grad_log_prob);
  const int64_t candidates = step.batch * step.count, chunks = chunks_of(step.n);
  std::unique_ptr<double[]> factors;
  if (incoming.log_prob.data) {
    factors.reset(new double[candidates]);
    for (int64_t i = 0; i < candidates; ++i) {
      const double sigma = step_row<double>(step, i % step.batch).sigma;
      factors[i] = density_factor(element(incoming.log_prob, i), sigma, step.n);
    }
  }
  const StepGradientTask task{step, incoming.next, gradient.data_ptr(), chunks, factors.get()};
  run(loops().step_gradient, &task, step.batch * chunks);
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CPU, m) {
  m.impl("ddim_step", TORCH_BOX(&dde_fast::ddim_step_cpu));
  m.impl("ddim_step_backward", TORCH_BOX(&dde_fast::ddim_step_backward_cpu));
}
