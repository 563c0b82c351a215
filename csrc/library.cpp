// Schemas of the raw ops (namespace dde_fast_cpp) and the choice of the CPU's instruction set.
// No gradients here: dde_fast/ops.py has the public ops. Stable ABI only: one build serves several
// torch and Python versions.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu.h"

namespace dde_fast {
namespace {

#define DDE_FAST_LOOPS(isa)                                             \
  Loops {                                                              \
    #isa, isa::errors_loop, isa::gradient_loop, isa::noise_loop,       \
        isa::step_loop, isa::step_gradient_loop                        \
  }
const Loops BASELINE = DDE_FAST_LOOPS(baseline);
#ifdef __x86_64__
const Loops AVX2 = DDE_FAST_LOOPS(avx2);
const Loops AVX512 = DDE_FAST_LOOPS(avx512);
const Loops AVX512BF16 = DDE_FAST_LOOPS(avx512bf16);
#endif
#undef DDE_FAST_LOOPS

// the loops of a set, null where this machine or build lacks it; "" is the best there is
const Loops* find(const std::string& name) {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && (name.empty() || name == "avx512bf16")) return &AVX512BF16;
  if (has_avx512 && (name.empty() || name == "avx512")) return &AVX512;
  if (has_avx2 && (name.empty() || name == "avx2")) return &AVX2;
#endif
  return name.empty() || name == "baseline" ? &BASELINE : nullptr;
}

std::atomic<const Loops*> in_use{nullptr};

void use(const std::string& name) {
  const Loops* found = find(name);
  STD_TORCH_CHECK(found != nullptr,
                  "DDE_FAST_CPU: expected baseline, avx2, avx512 or avx512bf16 and a CPU that has it, got ",
                  name);
  in_use = found;
}

}  // namespace

const Loops& loops() {
  if (!in_use) {
    const char* wanted = std::getenv("DDE_FAST_CPU");
    use(wanted ? wanted : "");
  }
  return *in_use;
}

// name of the set in use, after changing to `wanted` unless that is empty
std::string isa(std::string wanted) {
  if (!wanted.empty()) use(wanted);
  return loops().name;
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY(dde_fast_cpp, m) {
  m.def("isa(str wanted) -> str");
  m.def(
      "preference_loss(Tensor policy, Tensor? reference, Tensor target, Tensor timesteps, "
      "Tensor weights, Tensor margins, float beta, float lose_weight, int link, "
      "float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "preference_loss_with_gradient(Tensor(a!) gradient, Tensor policy, Tensor? reference, "
      "Tensor target, Tensor timesteps, Tensor weights, Tensor margins, float beta, "
      "float lose_weight, int link, float label_smoothing) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "preference_loss_backward(Tensor(a!) gradient, Tensor? grad_loss, Tensor? grad_logits, "
      "Tensor? grad_policy_error, Tensor policy, Tensor target, Tensor timesteps, Tensor logits, "
      "Tensor weights, float beta, float lose_weight, int link, float label_smoothing) -> ()");
  m.def("scale_gradient(Tensor(a!) gradient, Tensor factor) -> ()");
  m.def("pair_noise(Tensor(a!) noise, Tensor pair_ids, Tensor draws, int seed) -> ()");
  m.def(
      "pair_uniform(Tensor(a!) uniform, Tensor pair_ids, Tensor draws, int choice, int seed) "
      "-> ()");
  m.def(
      "pair_words(Tensor(a!) words, Tensor pair_ids, Tensor draws, int first_block, int seed) "
      "-> ()");
  m.def(
      "add_noise(Tensor(a!) noisy, Tensor(b!) noise, Tensor latents, Tensor timesteps, "
      "Tensor alphas_cumprod, Tensor pair_ids, Tensor draws, int seed) -> ()");
  m.def(
      "ddim_step(Tensor(a!) log_prob, Tensor(b!)? next, Tensor prediction, Tensor sample, "
      "Tensor given, Tensor coefficients, int prediction_type) -> ()");
  m.def(
      "ddim_step_backward(Tensor(a!) gradient, Tensor? grad_next, Tensor? grad_log_prob, "
      "Tensor prediction, Tensor sample, Tensor next, Tensor coefficients, int prediction_type) "
      "-> ()");
  m.def(
      "observe_ratios(Tensor(a!) sums, Tensor policy_error, Tensor reference_error, "
      "Tensor timesteps, Tensor scale) -> ()");
  m.def(
      "update_ratios(Tensor(a!) ratios, Tensor(b!) margins, Tensor(c!) sums, float decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&dde_fast::isa));
}
