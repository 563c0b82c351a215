// The ratio table on CUDA: one launch to observe a batch, one to update the table. Sums in a fixed
// order, no atomics; nothing is allocated or read back, so both can be captured in a graph.

#include "cuda.cuh"

namespace dde_fast {
namespace {

// A thread is a timestep and looks at every pair in order.
__global__ void __launch_bounds__(THREADS) observe_kernel(Observations a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= a.steps) return;
  double sums[4] = {}, count = 0;
#pragma unroll 4
  for (int64_t pair = 0; pair < a.pairs; ++pair) {
    double e[4];
    if (a.timesteps[pair] != t || !errors_of(a, pair, e)) continue;
#pragma unroll
    for (int row = 0; row < 4; ++row) sums[row] += e[row];
    ++count;
  }
  if (count == 0) return;
  const double scale = element(a.scale, t);
#pragma unroll
  for (int row = 0; row < 4; ++row) a.sums[row * a.steps + t] += scale * sums[row];
  a.sums[4 * a.steps + t] += count;
}

// Σ over later threads of the block, and over all of them; in a fixed order
__device__ __forceinline__ double sum_after(double x, double& all) {
  __shared__ double warps[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double from = x;  // Σ over this lane and the later ones
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_down_sync(0xFFFFFFFFu, from, offset);
    if (lane + offset < 32) from += other;
  }
  double after = __shfl_down_sync(0xFFFFFFFFu, from, 1);
  if (lane == 31) after = 0;
  __syncthreads();  // the tile before has been read
  if (lane == 0) warps[warp] = from;
  __syncthreads();
  double later = 0;
  all = 0;
#pragma unroll
  for (int i = WARPS - 1; i >= 0; --i) {
    if (i == warp) later = all;
    all += warps[i];
  }
  return later + after;
}

// One block, from the last timesteps to the first.
__global__ void __launch_bounds__(THREADS) update_kernel(Table a) {
  double later = 0;
  for (int64_t tile = (a.steps - 1) / THREADS; tile >= 0; --tile) {
    const int64_t t = tile * THREADS + threadIdx.x;
    double all;
    const double after = sum_after(t < a.steps ? update_step(a, t) : 0.0, all);
    if (t < a.steps) a.margins[t] = static_cast<float>(later + after);
    later += all;
  }
}

}  // namespace

void observe_ratios_cuda(Tensor sums,             // float64 [5, T]
                         Tensor policy_error,     // [2B]
                         Tensor reference_error,  // [2B]
                         Tensor timesteps,        // int64 [B] or [2B]
                         Tensor scale) {          // [T]
  for (const Tensor* x : {&policy_error, &reference_error, &timesteps, &scale}) {
    check_device(*x, sums, "observe_ratios");
  }
  const Observations a = observations_of(sums, policy_error, reference_error, timesteps, scale);
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  observe_kernel<<<blocks_of(1, (a.steps + THREADS - 1) / THREADS), THREADS, 0,
                   current_stream(sums)>>>(a);
  check_launch("observe_kernel");
}

void update_ratios_cuda(Tensor ratios,   // float32 [4, T]
                        Tensor margins,  // float32 [T]
                        Tensor sums,     // float64 [5, T]
                        double decay) {
  for (const Tensor* x : {&margins, &sums}) check_device(*x, ratios, "update_ratios");
  const Table a = table_of(ratios, margins, sums, decay);
  const torch::stable::accelerator::DeviceGuard guard(ratios.get_device_index());
  update_kernel<<<1, THREADS, 0, current_stream(ratios)>>>(a);
  check_launch("update_kernel");
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CUDA, m) {
  m.impl("observe_ratios", TORCH_BOX(&dde_fast::observe_ratios_cuda));
  m.impl("update_ratios", TORCH_BOX(&dde_fast::update_ratios_cuda));
}
