// From torch tensors to the plain views of rows.h, with the checks that keep memory safe; and the
// arguments of the raw ops as CPU and CUDA both read them. The loss looks at all there is to shapes
// here, for the other ops Python did.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "ddim.h"
#include "noise.h"
#include "preference.h"
#include "ratios.h"

namespace dde_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return F32;
    case ScalarType::Double:
      return F64;
    case ScalarType::Half:
      return F16;
    case ScalarType::BFloat16:
      return BF16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
}

// whether the elements fill their memory, in any order of the dimensions
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  int64_t filled = 1;
  for (bool grown = true; grown;) {
    grown = false;
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (x.size(i) == 1 || x.stride(i) != filled) continue;
      filled *= x.size(i), grown = true;
    }
  }
  return filled == x.numel();
}

// whether rows are dense and lie one behind the other
inline bool is_rows(const Tensor& x) {
  return is_dense(x) && (x.size(0) == 1 || x.stride(0) * x.size(0) == x.numel());
}

// [rows, …], dense, one row behind the other; the order inside a row is the caller's business
inline Rows rows_of(const Tensor& x, int64_t pairs, int64_t n, const char* name) {
  const int64_t rows = x.size(0);
  STD_TORCH_CHECK(rows == pairs || rows == 2 * pairs, name, ": expected ", pairs, " or ", 2 * pairs,
                  " rows, got ", rows);
  STD_TORCH_CHECK(x.numel() == rows * n && is_rows(x), name,
                  ": expected ", rows, " dense rows of ", n, " elements");
  return {x.data_ptr(), rows, dtype_of(x, name)};
}

// whether both hold rows of the same shape
inline bool same_rows(const Tensor& x, const Tensor& y) {
  bool same = x.dim() > 1 && x.dim() == y.dim();
  for (int64_t i = 1; same && i < x.dim(); ++i) same = x.size(i) == y.size(i);
  return same;
}

inline bool same_shape(const Tensor& x, const Tensor& y) {
  return same_rows(x, y) && x.size(0) == y.size(0);
}

// whether both are dense rows of one shape with their elements in one order
inline bool same_order(const Tensor& x, const Tensor& y) {
  bool same = is_rows(x) && is_rows(y);
  for (int64_t i = 0; same && i < x.dim(); ++i) {
    same = x.size(i) == 1 || y.size(i) == 1 || x.stride(i) == y.stride(i);
  }
  return same;
}

// copied only where it is not
inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// where the gradient of a prediction goes: rows and dtype are the prediction's
inline void* gradient_of(const Tensor& gradient, const Rows& policy, int64_t pairs, int64_t n) {
  const Rows g = rows_of(gradient, pairs, n, "gradient");
  STD_TORCH_CHECK(g.rows == policy.rows && g.dtype == policy.dtype,
                  "gradient: expected one like policy");
  return gradient.data_ptr();
}

// a tensor's elements as rows of one each, in the order of its memory
inline Rows elements_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.numel() == 0 || is_dense(x), name, ": expected dense memory");
  return {x.data_ptr(), x.numel(), dtype_of(x, name)};
}

inline void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.numel() == size && x.is_contiguous(), name, ": expected ", size,
                  " contiguous elements, got ", x.numel());
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": unexpected dtype");
}

inline Column column_of(const Tensor& x, int64_t size, const char* name) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  check_vector(x, size, wide ? ScalarType::Double : ScalarType::Float, name);
  return {x.data_ptr(), wide};
}

template <class T>
const T* optional_data(const OptionalTensor& x, int64_t size, ScalarType dtype, const char* name) {
  if (!x) return nullptr;
  check_vector(*x, size, dtype, name);
  return static_cast<const T*>(x->data_ptr());
}

inline Schedule schedule_of(const Tensor& timesteps, const Tensor& weights, const Tensor* margins,
                            int64_t pairs) {
  const int64_t steps = weights.numel();
  STD_TORCH_CHECK(steps > 0, "weights: expected some");
  const bool halves = timesteps.numel() == 2 * pairs;
  check_vector(timesteps, halves ? 2 * pairs : pairs, ScalarType::Long, "timesteps");
  STD_TORCH_CHECK(timesteps.dim() == 1, "timesteps: expected a vector");
  const Column margin = margins ? column_of(*margins, steps, "margins") : Column{nullptr, false};
  return {static_cast<const int64_t*>(timesteps.data_ptr()), column_of(weights, steps, "weights"),
          margin, steps, halves};
}

inline Stream stream_of(const Tensor& pair_ids, const Tensor& draws, int64_t seed) {
  const int64_t pairs = pair_ids.numel();
  STD_TORCH_CHECK(pairs > 0, "pair_ids: expected some");
  check_vector(pair_ids, pairs, ScalarType::Long, "pair_ids");
  check_vector(draws, pairs, ScalarType::Long, "draws");
  return {static_cast<const int64_t*>(pair_ids.data_ptr()),
          static_cast<const int64_t*>(draws.data_ptr()), static_cast<uint64_t>(seed)};
}

// elements of each of B rows
inline int64_t row_size(const Tensor& x, int64_t pairs, const char* name) {
  STD_TORCH_CHECK(x.numel() % pairs == 0, name, ": expected ", pairs, " rows");
  return x.numel() / pairs;
}

// how each row of a contiguous or channels_last tensor lies in memory
inline Layout layout_of(const Tensor& x, const char* name) {
  if (x.is_contiguous()) return {1, 0};
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected contiguous or channels_last memory");
  const int64_t channels = x.size(1), space = x.size(2) * x.size(3);
  const int64_t strides[4] = {channels * space, 1, x.size(3) * channels, channels};
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == strides[i], name,
                    ": expected contiguous or channels_last memory");
  }
  STD_TORCH_CHECK(channels * space < (int64_t{1} << 32), name, ": too large for channels_last");
  return {static_cast<uint32_t>(channels), static_cast<uint32_t>(space)};
}

// float64 [5, T]: four rows of observations, then their numbers
inline int64_t steps_of(const Tensor& sums) {
  const int64_t steps = sums.numel() / 5;
  STD_TORCH_CHECK(sums.dim() == 2 && steps > 0, "sums: expected [5, T]");
  check_vector(sums, 5 * steps, ScalarType::Double, "sums");
  return steps;
}

inline Observations observations_of(const Tensor& sums, const Tensor& policy_error,
                                    const Tensor& reference_error, const Tensor& timesteps,
                                    const Tensor& scale) {
  const int64_t steps = steps_of(sums), pairs = policy_error.numel() / 2;
  const bool halves = timesteps.numel() == 2 * pairs;
  check_vector(timesteps, halves ? 2 * pairs : pairs, ScalarType::Long, "timesteps");
  return {static_cast<double*>(sums.data_ptr()),
          column_of(policy_error, 2 * pairs, "policy_error"),
          column_of(reference_error, 2 * pairs, "reference_error"),
          static_cast<const int64_t*>(timesteps.data_ptr()),
          column_of(scale, steps, "scale"),
          pairs,
          steps};
}

inline Table table_of(const Tensor& ratios, const Tensor& margins, const Tensor& sums,
                      double decay) {
  const int64_t steps = steps_of(sums);
  check_vector(ratios, 4 * steps, ScalarType::Float, "ratios");
  check_vector(margins, steps, ScalarType::Float, "margins");
  return {static_cast<float*>(ratios.data_ptr()), static_cast<float*>(margins.data_ptr()),
          static_cast<double*>(sums.data_ptr()), decay, steps};
}

// A scalar (no size) or a vector on the device of `like`. Straight from the allocator's shim:
// torch::stable::empty looks its operator up by name at every call, which takes a microsecond.
inline Tensor empty_like_of(const Tensor& like, std::optional<int64_t> size, bool wide) {
  const int64_t stride = 1;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      size ? 1 : 0, size ? &*size : nullptr, &stride,
      wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), device,
      like.get_device_index(), &made));
  return Tensor(made);
}

// What the forward reads and writes.
struct Forward {
  OptionalTensor held[6];          // what the following point into; policy first
  Rows policy, reference, target;  // reference.data null: not read
  Column errors;                   // [2B], the reference's cached errors; data null: none
  Schedule schedule;
  Objective objective;
  int64_t pairs, n;
  bool wide;
  Tensor loss, logits, policy_error, reference_error, margin;

  // A gradient to write in the order of policy: that one, or one to copy to it.
  Tensor in_order(const Tensor& gradient) const {
    const Tensor& like = *held[0];
    STD_TORCH_CHECK(same_shape(gradient, like) && gradient.scalar_type() == like.scalar_type(),
                    "gradient: expected one like policy");
    return same_order(gradient, like) ? gradient : torch::stable::empty_like(like);
  }
  bool has_reference() const { return reference.data || errors.data; }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {loss, logits, policy_error, reference_error, margin};
  }
};

// Looks at all there is to the inputs but their values, and copies those whose elements are not dense
// or in another order than the others': a mean does not care which, if it is the same.
inline Forward forward_of(Tensor policy, OptionalTensor reference, Tensor target, Tensor timesteps,
                          Tensor weights, Tensor margins, const Objective& objective) {
  Forward f{};
  STD_TORCH_CHECK(policy.numel() > 0, "policy: expected elements");
  const bool prediction = reference && reference->dim() != 1;  // else errors [2B]
  STD_TORCH_CHECK(same_rows(policy, target), "target: expected rows of policy's shape");
  STD_TORCH_CHECK(!prediction || same_shape(policy, *reference),
                  "reference: expected the shape of policy");
  if (!same_order(policy, target) || (prediction && !same_order(policy, *reference))) {
    policy = packed(policy), target = packed(target);
    if (prediction) reference = packed(*reference);
  }
  if (reference && !prediction) reference = packed(*reference);
  f.held[0] = policy, f.held[1] = target, f.held[2] = timesteps = packed(timesteps);
  f.held[3] = weights = packed(weights), f.held[4] = margins = packed(margins);
  f.held[5] = reference;
  const int64_t rows = policy.size(0) > target.size(0) ? policy.size(0) : target.size(0);
  STD_TORCH_CHECK(rows > 0 && rows % 2 == 0, "policy: expected an even batch, got ", rows);
  f.pairs = rows / 2;
  f.n = policy.numel() / policy.size(0);
  f.policy = rows_of(policy, f.pairs, f.n, "policy");
  f.target = rows_of(target, f.pairs, f.n, "target");
  f.wide = f.policy.dtype == F64 || f.target.dtype == F64;
  if (prediction) {
    f.reference = rows_of(*reference, f.pairs, f.n, "reference");
    f.wide = f.wide || f.reference.dtype == F64;
  } else if (reference) {
    f.errors = column_of(*reference, rows, "reference");
  }
  f.schedule = schedule_of(timesteps, weights, &margins, f.pairs);
  f.objective = objective;
  f.loss = empty_like_of(policy, std::nullopt, f.wide);
  f.logits = empty_like_of(policy, f.pairs, f.wide);
  f.policy_error = empty_like_of(policy, rows, f.wide);
  f.reference_error = empty_like_of(policy, f.has_reference() ? rows : 0, f.wide);
  f.margin = empty_like_of(policy, f.pairs, f.wide);
  return f;
}

// as rows_of, with neither more nor fewer rows
inline Rows all_rows_of(const Tensor& x, int64_t rows, int64_t n, const char* name) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(0) == rows, name, ": expected ", rows, " rows, got ",
                  x.dim() > 0 ? x.size(0) : 0);
  return rows_of(x, rows, n, name);
}

// What a DDIM step reads in either direction.
inline Step step_of(const Tensor& prediction, const Tensor& sample, const Tensor& candidates,
                    const Tensor& coefficients, int64_t type) {
  Step step{};
  STD_TORCH_CHECK(sample.dim() > 0 && sample.numel() > 0, "sample: expected a batch of elements");
  STD_TORCH_CHECK(candidates.dim() > 0 && candidates.numel() > 0,
                  "candidates: expected a batch of elements");
  STD_TORCH_CHECK(type >= EPSILON && type <= SAMPLE, "prediction_type: expected 0, 1 or 2, got ",
                  type);
  step.type = type;
  step.batch = sample.size(0);
  step.n = sample.numel() / step.batch;
  step.count = candidates.size(0) / step.batch;
  step.sample = all_rows_of(sample, step.batch, step.n, "sample");
  step.prediction = all_rows_of(prediction, step.batch, step.n, "prediction");
  step.candidates = all_rows_of(candidates, step.batch * step.count, step.n, "candidates");
  step.wide = step.sample.dtype == F64 || step.prediction.dtype == F64 ||
              step.candidates.dtype == F64;
  check_vector(coefficients, 5 * step.batch, ScalarType::Float, "coefficients");
  step.coefficients = static_cast<const float*>(coefficients.data_ptr());
  return step;
}

// where the next samples go; null if they were given
inline void* next_of(const Step& step, const OptionalTensor& next) {
  if (!next) return nullptr;
  const Rows rows = all_rows_of(*next, step.candidates.rows, step.n, "next");
  STD_TORCH_CHECK(rows.dtype == step.sample.dtype, "next: expected the dtype of sample");
  return next->data_ptr();
}

// Gradients that arrive at a DDIM step; data null: none.
struct StepIncoming {
  Rows next;        // [K·B]
  Column log_prob;  // [K·B]
};

inline StepIncoming incoming_of(Step& step, const Tensor& gradient, const OptionalTensor& grad_next,
                                const OptionalTensor& grad_log_prob) {
  const Rows out = all_rows_of(gradient, step.batch, step.n, "gradient");
  STD_TORCH_CHECK(out.dtype == step.prediction.dtype, "gradient: expected one like prediction");
  StepIncoming incoming{};
  if (grad_next) incoming.next = all_rows_of(*grad_next, step.candidates.rows, step.n, "grad_next");
  if (grad_log_prob) {
    incoming.log_prob = column_of(*grad_log_prob, step.candidates.rows, "grad_log_prob");
  }
  // the forward's precision, which the noise may have set
  step.wide = step.wide || incoming.log_prob.wide;
  return incoming;
}

}  // namespace dde_fast
