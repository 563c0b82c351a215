// The noise on the CPU: threads over (pair, chunk). The loops themselves are noise_loops.cpp's.

#include <memory>

#include "cpu.h"
#include "pages.h"
#include "tensors.h"

namespace dde_fast {
namespace {

NoiseTask task_of(const Tensor& noise, const Tensor& pair_ids, const Tensor& draws, int64_t seed) {
  NoiseTask task{};
  task.stream = stream_of(pair_ids, draws, seed);
  task.pairs = pair_ids.numel();
  task.n = row_size(noise, task.pairs, "noise");
  task.to = layout_of(noise, "noise");
  task.chunks = chunks_of(task.n);
  task.noise = noise.data_ptr();
  task.dtype = dtype_of(noise, "noise");
  prefer_huge_pages(task.noise, task.pairs * task.n * bytes_of(task.dtype));
  return task;
}

void run(const NoiseTask& task) {
  const Loop loop = loops().noise;
  torch::stable::parallel_for(0, task.pairs * task.chunks, 1, [&](int64_t begin, int64_t end) {
    loop(&task, begin, end);
  });
}

}  // namespace

void pair_noise_cpu(Tensor noise,     // [B, …]
                    Tensor pair_ids,  // int64 [B]
                    Tensor draws,     // int64 [B]
                    int64_t seed) {   // the bits of a 64-bit key
  run(task_of(noise, pair_ids, draws, seed));
}

void add_noise_cpu(Tensor noisy,           // [2B, …]
                   Tensor noise,           // [B, …], dtype of noisy
                   Tensor latents,         // [2B, …]
                   Tensor timesteps,       // int64 [B] or [2B]
                   Tensor alphas_cumprod,  // [T]
                   Tensor pair_ids, Tensor draws, int64_t seed) {
  NoiseTask task = task_of(noise, pair_ids, draws, seed);
  task.latents = rows_of(latents, task.pairs, task.n, "latents");
  const Rows out = rows_of(noisy, task.pairs, task.n, "noisy");
  task.from = layout_of(latents, "latents");
  STD_TORCH_CHECK(out.rows == 2 * task.pairs && out.dtype == task.dtype &&
                      layout_of(noisy, "noisy").channels == task.to.channels,
                  "noisy: expected ", 2 * task.pairs, " rows of noise's dtype and layout");
  const Schedule schedule = schedule_of(timesteps, alphas_cumprod, nullptr, task.pairs);
  const std::unique_ptr<float[]> coefficients(new float[2 * task.pairs]);
  for (int64_t pair = 0; pair < task.pairs; ++pair) {
    noise_coefficients(schedule, pair, task.pairs, coefficients[pair],
                       coefficients[task.pairs + pair]);
  }
  task.noisy = noisy.data_ptr();
  prefer_huge_pages(task.noisy, 2 * task.pairs * task.n * bytes_of(task.dtype));
  task.signal = coefficients.get();
  task.sigma = coefficients.get() + task.pairs;
  run(task);
}

void pair_uniform_cpu(Tensor uniform,  // float32 [B]
                      Tensor pair_ids, Tensor draws, int64_t choice, int64_t seed) {
  const Stream stream = stream_of(pair_ids, draws, seed);
  check_vector(uniform, pair_ids.numel(), ScalarType::Float, "uniform");
  float* out = static_cast<float*>(uniform.data_ptr());
  for (int64_t i = 0; i < pair_ids.numel(); ++i) out[i] = choice_uniform(stream, i, choice);
}

// The raw integers, for the tests: the same functions make them on CUDA.
void pair_words_cpu(Tensor words,  // int64 [B, K, 4], values in [0, 2³²)
                    Tensor pair_ids, Tensor draws,
                    int64_t first_block,  // counter of words[:, 0]
                    int64_t seed) {
  const Stream stream = stream_of(pair_ids, draws, seed);
  const int64_t pairs = pair_ids.numel(), blocks = words.numel() / (4 * pairs);
  check_vector(words, 4 * pairs * blocks, ScalarType::Long, "words");
  int64_t* out = static_cast<int64_t*>(words.data_ptr());
  for (int64_t i = 0; i < pairs * blocks; ++i) {
    uint32_t c[4];
    block_words(stream, i / blocks, static_cast<uint32_t>(first_block + i % blocks), c);
    for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = c[j];
  }
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CPU, m) {
  m.impl("pair_noise", TORCH_BOX(&dde_fast::pair_noise_cpu));
  m.impl("pair_uniform", TORCH_BOX(&dde_fast::pair_uniform_cpu));
  m.impl("pair_words", TORCH_BOX(&dde_fast::pair_words_cpu));
  m.impl("add_noise", TORCH_BOX(&dde_fast::add_noise_cpu));
}
