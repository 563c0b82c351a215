// The loss head's vector loops, compiled once per instruction set (DDE_FAST_ISA, DDE_FAST_VECTOR
// bytes). Without contraction and with the same 16 sums side by side, all sets give the same bits.

#include "cpu_convert.h"
#include "cpu_sums.h"

namespace dde_fast {
namespace DDE_FAST_ISA {
namespace {

// LANES running sums each of (y-o)², (y-o_ref)² and their difference
template <class A>
struct Sums {
  typename Vector<A>::Type policy[LANES * sizeof(A) / DDE_FAST_VECTOR];
  typename Vector<A>::Type reference[LANES * sizeof(A) / DDE_FAST_VECTOR];
  typename Vector<A>::Type difference[LANES * sizeof(A) / DDE_FAST_VECTOR];
};

template <class A, bool REFERENCE>
void add_block(const A* o, const A* r, const A* y, int64_t n, Sums<A>& sums) {
  using V = typename Vector<A>::Type;
  using U = typename Vector<A>::Unaligned;
  constexpr int64_t WIDTH = DDE_FAST_VECTOR / sizeof(A), COUNT = LANES / WIDTH;
  V p[COUNT], q[COUNT], d[COUNT];
  for (int64_t k = 0; k < COUNT; ++k) {
    p[k] = sums.policy[k], q[k] = sums.reference[k], d[k] = sums.difference[k];
  }
  for (int64_t i = 0; i < n; i += LANES) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < COUNT; ++k) {
      const int64_t at = i + k * WIDTH;
      const V b_o = *reinterpret_cast<const U*>(o + at), b_y = *reinterpret_cast<const U*>(y + at);
      const V e = b_y - b_o;
      p[k] += e * e;
      if (REFERENCE) {
        const V b_r = *reinterpret_cast<const U*>(r + at), f = b_y - b_r;
        q[k] += f * f;
        d[k] += (b_r - b_o) * (e + f);
      }
    }
  }
  for (int64_t k = 0; k < COUNT; ++k) {
    sums.policy[k] = p[k], sums.reference[k] = q[k], sums.difference[k] = d[k];
  }
}

// Both halves of a pair in turn, so that a row they share is read and widened once.
template <class A>
void errors_of(const ErrorsTask& task, int64_t begin, int64_t end) {
  alignas(64) A b_o[BLOCK], b_r[BLOCK], b_y[BLOCK];
  const int64_t rows = 2 * task.pairs, stride = rows * task.chunks;
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t pair = i_task / task.chunks, chunk = i_task % task.chunks;
    const int64_t stop = (chunk + 1) * CHUNK < task.n ? (chunk + 1) * CHUNK : task.n;
    Sums<A> sums[2] = {};
    for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      const A *o = nullptr, *r = nullptr, *y = nullptr;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t sample = pair + half * task.pairs;
        if (!half || task.target.rows == rows) y = widen(task.target, sample, task.n, at, n, b_y);
        if (!half || task.policy.rows == rows) o = widen(task.policy, sample, task.n, at, n, b_o);
        if (!task.reference.data) {
          add_block<A, false>(o, nullptr, y, n, sums[half]);
          continue;
        }
        if (!half || task.reference.rows == rows) {
          r = widen(task.reference, sample, task.n, at, n, b_r);
        }
        add_block<A, true>(o, r, y, n, sums[half]);
      }
    }
    for (int64_t half = 0; half < 2; ++half) {
      double* out = task.partial + (pair + half * task.pairs) * task.chunks + chunk;
      out[0] = total<A>(sums[half].policy);
      out[stride] = total<A>(sums[half].reference);
      out[2 * stride] = total<A>(sums[half].difference);
    }
  }
}

template <class A>
void gradient_of(const GradientTask& task, int64_t begin, int64_t end) {
  alignas(64) A b_o[BLOCK], b_y[BLOCK], b_g[BLOCK];
  const int64_t rows = 2 * task.pairs;
  const bool shared = task.policy.rows != rows;
  const bool direct = task.policy.dtype == (sizeof(A) == 8 ? F64 : F32);
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t pair = i_task / task.chunks, chunk = i_task % task.chunks;
    const int64_t stop = (chunk + 1) * CHUNK < task.n ? (chunk + 1) * CHUNK : task.n;
    for (int64_t at = chunk * CHUNK; at < stop; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      const A *o = nullptr, *y = nullptr;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t sample = pair + half * task.pairs;
        const A factor = static_cast<A>(task.factors[sample]);
        if (!half || !shared) o = widen(task.policy, sample, task.n, at, n, b_o);
        if (!half || task.target.rows == rows) y = widen(task.target, sample, task.n, at, n, b_y);
        const int64_t to = row_of(task.policy, sample) * task.n + at;
        A* g = direct ? static_cast<A*>(task.gradient) + to : b_g;
        if (shared && half) {
          for (int64_t i = 0; i < n; ++i) g[i] += (o[i] - y[i]) * factor;
        } else {
          for (int64_t i = 0; i < n; ++i) g[i] = (o[i] - y[i]) * factor;
        }
        if (!direct && (half || !shared)) narrow(g, task.gradient, task.policy.dtype, to, n);
      }
    }
  }
}

}  // namespace

void errors_loop(const void* task, int64_t begin, int64_t end) {
  const ErrorsTask& errors = *static_cast<const ErrorsTask*>(task);
  errors.wide ? errors_of<double>(errors, begin, end) : errors_of<float>(errors, begin, end);
}

void gradient_loop(const void* task, int64_t begin, int64_t end) {
  const GradientTask& gradient = *static_cast<const GradientTask*>(task);
  gradient.wide ? gradient_of<double>(gradient, begin, end)
                : gradient_of<float>(gradient, begin, end);
}

}  // namespace DDE_FAST_ISA
}  // namespace dde_fast
