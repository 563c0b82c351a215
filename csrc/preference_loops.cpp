// The loss head's vector loops, compiled once per instruction set (DDE_FAST_ISA, DDE_FAST_VECTOR
// bytes). The same 16 sums side by side, added up in one order: the same bits on any number of
// threads, and on all sets with a fused multiply-add (x86's baseline has none).

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

// a vector of elements into the sums of their lanes
template <bool REFERENCE, class V>
DDE_FN void add_vector(const V& o, const V& r, const V& y, V& policy, V& reference, V& difference) {
  const V e = y - o;
  policy = fused(e, e, policy);
  if (REFERENCE) {
    const V f = y - r;
    reference = fused(f, f, reference);
    // e + f as a fused multiply-add: of those and of additions a core takes as many at a time
    difference = fused(V(r - o), fused(e, V{} + 1, f), difference);
  }
}

// elements of the accumulating type; n whole lanes
template <class A, bool REFERENCE>
void add_block(const A* o, const A* r, const A* y, int64_t n, Sums<A>& sums) {
  constexpr int64_t WIDTH = DDE_FAST_VECTOR / sizeof(A), COUNT = LANES / WIDTH;
  Sums<A> local = sums;  // in registers
  for (int64_t i = 0; i < n; i += LANES) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < COUNT; ++k) {
      const int64_t at = i + k * WIDTH;
      add_vector<REFERENCE>(load_vector(o + at), load_vector(r + at), load_vector(y + at),
                            local.policy[k], local.reference[k], local.difference[k]);
    }
  }
  sums = local;
}

// bf16; n twice whole lanes, as two neighbours share one
template <bool REFERENCE>
void add_block(const uint16_t* o, const uint16_t* r, const uint16_t* y, int64_t n,
               Sums<float>& sums) {
  constexpr int64_t WIDTH = DDE_FAST_VECTOR / 2, COUNT = 2 * LANES / WIDTH;
  Sums<float> local = sums;
  for (int64_t i = 0; i < n; i += 2 * LANES) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < COUNT; ++k) {
      const int64_t at = i + k * WIDTH;
      const Words b_o = load_words(o + at), b_r = load_words(r + at), b_y = load_words(y + at);
      add_vector<REFERENCE>(even(b_o), even(b_r), even(b_y), local.policy[k], local.reference[k],
                            local.difference[k]);
      add_vector<REFERENCE>(odd(b_o), odd(b_r), odd(b_y), local.policy[k], local.reference[k],
                            local.difference[k]);
    }
  }
  sums = local;
}

// where a sample's row begins, in rows of E
template <class E>
DDE_FN const E* row(const Rows& x, int64_t sample, int64_t n) {
  return static_cast<const E*>(x.data) + row_of(x, sample) * n;
}

// A chunk of bf16 straight from the tensors; false where the task is none or has odd ends.
bool add_bf16(const ErrorsTask& task, int64_t pair, int64_t begin, int64_t end, Sums<float>* sums) {
  const bool is_bf16 = task.policy.dtype == BF16 && task.target.dtype == BF16 &&
                       (!task.reference.data || task.reference.dtype == BF16);
  if (!is_bf16 || end % (2 * LANES)) return false;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t sample = pair + half * task.pairs;
    const uint16_t* o = row<uint16_t>(task.policy, sample, task.n) + begin;
    const uint16_t* y = row<uint16_t>(task.target, sample, task.n) + begin;
    if (task.reference.data) {
      const uint16_t* r = row<uint16_t>(task.reference, sample, task.n) + begin;
      add_block<true>(o, r, y, end - begin, sums[half]);
    } else {
      add_block<false>(o, o, y, end - begin, sums[half]);
    }
  }
  return true;
}

bool add_bf16(const ErrorsTask&, int64_t, int64_t, int64_t, Sums<double>*) { return false; }

// Both halves of a pair in turn, so that a row they share is read and widened once.
template <class A>
void errors_of(const ErrorsTask& task, int64_t begin, int64_t end) {
  alignas(64) A b_o[BLOCK], b_r[BLOCK], b_y[BLOCK];
  const int64_t rows = 2 * task.pairs, stride = rows * task.chunks;
  for (int64_t i_task = begin; i_task < end; ++i_task) {
    const int64_t pair = i_task / task.chunks, chunk = i_task % task.chunks;
    const int64_t stop = (chunk + 1) * CHUNK < task.n ? (chunk + 1) * CHUNK : task.n;
    Sums<A> sums[2] = {};
    const bool done = add_bf16(task, pair, chunk * CHUNK, stop, sums);
    for (int64_t at = chunk * CHUNK; at < stop && !done; at += BLOCK) {
      const int64_t n = stop - at < BLOCK ? stop - at : BLOCK;
      const A *o = nullptr, *r = nullptr, *y = nullptr;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t sample = pair + half * task.pairs;
        if (!half || task.target.rows == rows) y = widen(task.target, sample, task.n, at, n, b_y);
        if (!half || task.policy.rows == rows) o = widen(task.policy, sample, task.n, at, n, b_o);
        if (!task.reference.data) {
          add_block<A, false>(o, o, y, n, sums[half]);
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

// n elements, twice whole lanes, straight from and to the tensors
template <bool STREAM>
void gradient_row(const uint16_t* o, const uint16_t* y, uint16_t* g, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += DDE_FAST_VECTOR / 2) {
    const Words b_o = load_words(o + i), b_y = load_words(y + i);
    const Words x = narrowed((even(b_o) - even(b_y)) * factor, (odd(b_o) - odd(b_y)) * factor);
    store_vector<STREAM>((Floats)x, g + i);
  }
}

template <bool STREAM>
void gradient_row(const float* o, const float* y, float* g, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += DDE_FAST_VECTOR / 4) {
    store_vector<STREAM>((load_vector(o + i) - load_vector(y + i)) * factor, g + i);
  }
}

// Both halves block by block, so that a target they share comes from the nearest cache.
template <class E>
void gradient_rows(const GradientTask& task, int64_t pair, int64_t begin, int64_t end) {
  float factors[2];
  for (int64_t half = 0; half < 2; ++half) {
    const double exact = task.factors[pair + half * task.pairs];
    factors[half] = exact == exact ? static_cast<float>(exact) : __builtin_nanf("");
  }
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = end - at < BLOCK ? end - at : BLOCK;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t sample = pair + half * task.pairs;
      const E* o = row<E>(task.policy, sample, task.n) + at;
      const E* y = row<E>(task.target, sample, task.n) + at;
      E* g = static_cast<E*>(task.gradient) + sample * task.n + at;
      task.stream ? gradient_row<true>(o, y, g, n, factors[half])
                  : gradient_row<false>(o, y, g, n, factors[half]);
    }
  }
}

// A chunk of fp32 or bf16 without a detour; false where the task is neither, has odd ends, or sums
// two halves.
bool gradient_direct(const GradientTask& task, int64_t pair, int64_t begin, int64_t end) {
  const DType dtype = task.policy.dtype;
  const bool shared = task.policy.rows == task.pairs, whole = end % (2 * LANES) == 0;
  if (task.wide || task.target.dtype != dtype || shared || !whole) return false;
  if (dtype == F32) return gradient_rows<float>(task, pair, begin, end), true;
  if (dtype == BF16) return gradient_rows<uint16_t>(task, pair, begin, end), true;
  return false;
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
    if (gradient_direct(task, pair, chunk * CHUNK, stop)) continue;
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
  if (gradient.stream) finish_stream();
}

}  // namespace DDE_FAST_ISA
}  // namespace dde_fast
