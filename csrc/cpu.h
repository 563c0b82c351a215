// The CPU's vector loops: what they are given, and which instruction sets there are.
// The *_loops.cpp are compiled once per set; nothing from std in here.
#pragma once

#include "ddim.h"
#include "noise.h"
#include "rows.h"

namespace dde_fast {

constexpr int64_t BLOCK = 512;    // elements widened at a time, on the stack
constexpr int64_t CHUNK = 4096;   // elements of one task: a fixed grid, whatever the threads
constexpr int64_t LANES = 16;     // sums kept side by side: the same on every instruction set
constexpr int64_t GRAIN = 8;      // fewest tasks worth a thread

DDE_FN int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

// A task is (pair, chunk) = (task / chunks, task % chunks).
struct ErrorsTask {
  Rows policy, reference, target;  // reference.data null: none to read
  int64_t pairs, n, chunks;
  bool wide;        // sum in fp64
  double* partial;  // [3, 2B, chunks]: sums of (y-o)², (y-o_ref)² and their difference
};

struct GradientTask {
  Rows policy, target;
  void* gradient;  // rows and dtype of policy
  int64_t pairs, n, chunks;
  bool wide;
  bool stream;            // rows of 64 bytes, too many for the caches: write around them
  const double* factors;  // [2B], 2/N · d loss / d e
};

struct NoiseTask {
  void* noise;  // [B, N]
  void* noisy;  // [2B, N], null: noise alone
  DType dtype;  // of both
  Rows latents;
  Layout from, to;  // of the latents, and of noise and noisy
  const float *signal, *sigma;  // [B], √ᾱ_t and √(1-ᾱ_t)
  Stream stream;
  int64_t pairs, n, chunks;
};

struct StepTask {
  Step step;        // candidates: the noise, or the next samples
  void* next;       // [K·B, N], null: given
  DType dtype;      // of next
  int64_t chunks;
  double* partial;  // [K·B, chunks]: sums of (next - μ)²
};

struct StepGradientTask {
  Step step;       // candidates: the next samples
  Rows grad_next;  // [K·B], data null: none
  void* gradient;  // rows and dtype of prediction
  int64_t chunks;
  const double* factors;  // [K·B], d loss / d log_prob · 1/(σ²N), null: none
};

using Loop = void (*)(const void* task, int64_t begin, int64_t end);

struct Loops {
  const char* name;
  Loop errors, gradient, noise, step, step_gradient;
};

#define DDE_FAST_DECLARE_LOOPS(isa)                                        \
  namespace isa {                                                          \
  void errors_loop(const void* task, int64_t begin, int64_t end);          \
  void gradient_loop(const void* task, int64_t begin, int64_t end);        \
  void noise_loop(const void* task, int64_t begin, int64_t end);           \
  void step_loop(const void* task, int64_t begin, int64_t end);            \
  void step_gradient_loop(const void* task, int64_t begin, int64_t end);   \
  }
DDE_FAST_DECLARE_LOOPS(baseline)
DDE_FAST_DECLARE_LOOPS(avx2)
DDE_FAST_DECLARE_LOOPS(avx512)
DDE_FAST_DECLARE_LOOPS(avx512bf16)
#undef DDE_FAST_DECLARE_LOOPS

// the loops of the set in use (library.cpp)
const Loops& loops();

}  // namespace dde_fast
