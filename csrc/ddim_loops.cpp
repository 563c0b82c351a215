// The DDIM step's vector loops, compiled once per instruction set (DDE_FAST_ISA, DDE_FAST_VECTOR
// bytes). Without contraction all sets give the same bits, and the samples are eager PyTorch's.

#include "cpu_convert.h"
#include "cpu_sums.h"

namespace dde_fast {
namespace DDE_FAST_ISA {
namespace {

// Σ (next - μ)² over whole lanes
template <class A>
double squares(const A* next, const A* mean, int64_t n) {
  using V = typename Vector<A>::Type;
  constexpr int64_t WIDTH = DDE_FAST_VECTOR / sizeof(A), COUNT = LANES / WIDTH;
  V sums[COUNT] = {};
  for (int64_t i = 0; i < n; i += LANES) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < COUNT; ++k) {
      const int64_t at = i + k * WIDTH;
      const V e = load_vector(next + at) - load_vector(mean + at);
      sums[k] += e * e;
    }
  }
  return total<A>(sums);
}

// μ of n elements, filled up with zeros to whole lanes as `widen` does
template <class A>
void block_means(const Step& step, int64_t row, int64_t at, int64_t n, A* mean) {
  alignas(64) A b_x[BLOCK], b_o[BLOCK];
  const A* x = widen(step.sample, row, step.n, at, n, b_x);
  const A* o = widen(step.prediction, row, step.n, at, n, b_o);
  means(step.type, step_row<A>(step, row), x, o, mean, n);
  for (int64_t i = n; i % LANES; ++i) mean[i] = 0;
}

template <class A>
void step_of(const StepTask& task, int64_t begin, int64_t end) {
  const Step& step = task.step;
  alignas(64) A mean[BLOCK], b_z[BLOCK], b_next[BLOCK];
  const Rows made{task.next, step.batch * step.count, task.dtype};
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t row = i_task / task.chunks, chunk = i_task % task.chunks;
    const A sigma = step_row<A>(step, row).sigma;
    const int64_t start = chunk * CHUNK;
    const int64_t stop = start + CHUNK < step.n ? start + CHUNK : step.n;
    for (int64_t at = start; at < stop; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      block_means(step, row, at, n, mean);
      for (int64_t k = 0; k < step.count; ++k) {
        const int64_t candidate = k * step.batch + row;
        const A* next = widen(step.candidates, candidate, step.n, at, n, b_z);
        if (made.data) {
          for (int64_t i = 0; i < n; ++i) b_next[i] = mean[i] + sigma * next[i];
          narrow(b_next, task.next, task.dtype, candidate * step.n + at, n);
          next = widen(made, candidate, step.n, at, n, b_next);  // as rounded
        }
        double* sum = task.partial + candidate * task.chunks + chunk;
        *sum = (at == start ? 0 : *sum) + squares(next, mean, n);
      }
    }
  }
}

template <class A>
void step_gradient_of(const StepGradientTask& task, int64_t begin, int64_t end) {
  const Step& step = task.step;
  alignas(64) A mean[BLOCK], b_next[BLOCK], b_incoming[BLOCK], g[BLOCK];
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t row = i_task / task.chunks, chunk = i_task % task.chunks;
    const A slope = static_cast<A>(slope_of(step, row));
    const int64_t stop = (chunk + 1) * CHUNK < step.n ? (chunk + 1) * CHUNK : step.n;
    for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      if (task.factors) block_means(step, row, at, n, mean);
      for (int64_t i = 0; i < n; ++i) g[i] = 0;
      for (int64_t k = 0; k < step.count; ++k) {
        const int64_t candidate = k * step.batch + row;
        if (task.grad_next.data) {
          const A* incoming = widen(task.grad_next, candidate, step.n, at, n, b_incoming);
          for (int64_t i = 0; i < n; ++i) g[i] += incoming[i];
        }
        if (task.factors) {
          const A factor = static_cast<A>(task.factors[candidate]);
          const A* next = widen(step.candidates, candidate, step.n, at, n, b_next);
          for (int64_t i = 0; i < n; ++i) g[i] += factor * (next[i] - mean[i]);
        }
      }
      for (int64_t i = 0; i < n; ++i) g[i] *= slope;
      narrow(g, task.gradient, step.prediction.dtype, row * step.n + at, n);
    }
  }
}

}  // namespace

void step_loop(const void* argument, int64_t begin, int64_t end) {
  const StepTask& task = *static_cast<const StepTask*>(argument);
  task.step.wide ? step_of<double>(task, begin, end) : step_of<float>(task, begin, end);
}

void step_gradient_loop(const void* argument, int64_t begin, int64_t end) {
  const StepGradientTask& task = *static_cast<const StepGradientTask*>(argument);
  task.step.wide ? step_gradient_of<double>(task, begin, end)
                 : step_gradient_of<float>(task, begin, end);
}

}  // namespace DDE_FAST_ISA
}  // namespace dde_fast
