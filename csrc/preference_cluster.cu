// The loss with its gradient on CUDA: one launch where there are clusters of blocks and a pair fits
// into their shared memory, two anywhere else.

#include "preference_cluster.cuh"

#include <array>
#include <atomic>
#include <cstdio>

#include "preference_cuda.cuh"

namespace dde_fast {
namespace {

int attribute_of(cudaDeviceAttr attribute, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Whether the device can run such clusters. Asked once for each size of a cluster, unless later
// ones need more memory: the driver takes its time to answer.
template <class P, class Y, bool REFERENCE>
bool fits(const cudaLaunchConfig_t& config, unsigned blocks, int64_t most, int device) {
  static std::array<std::array<std::atomic<size_t>, MAX_CLUSTER + 1>, 128> known{};
  std::atomic<size_t>& fitting = known.at(device)[blocks];
  if (config.dynamicSmemBytes <= fitting) return true;
  const auto kernel = pair_kernel<P, Y, REFERENCE>;
  const auto set = [&](cudaFuncAttribute attribute, int64_t value) {
    return cudaFuncSetAttribute(kernel, attribute, static_cast<int>(value)) == cudaSuccess;
  };
  if (config.dynamicSmemBytes > static_cast<size_t>(most)) return false;
  int clusters = 0;
  if (set(cudaFuncAttributeMaxDynamicSharedMemorySize, most) &&
      (blocks <= PORTABLE_CLUSTER || set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1))) {
    cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  }
  const cudaError_t error = cudaGetLastError();
  if (clusters > 0) {
    fitting = config.dynamicSmemBytes;
    return true;
  }
  static std::atomic<bool> said{false};
  if (!said.exchange(true)) {
    std::fprintf(stderr,
                 "dde_fast: the loss takes two launches: no cluster of %u blocks with %zu bytes of "
                 "shared memory each (of %lld) runs on device %d: %s\n",
                 blocks, config.dynamicSmemBytes, static_cast<long long>(most), device,
                 cudaGetErrorString(error));
  }
  return false;
}

// false: not on this device
template <class P, class Y, bool REFERENCE>
bool launch_clusters(const PairLoss& a, int64_t most, int device, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {a.blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks_of(a.inputs.pairs, a.blocks);
  config.blockDim = THREADS;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes(a.share));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (!fits<P, Y, REFERENCE>(config, a.blocks, most, device)) return false;
  cudaLaunchKernelEx(&config, pair_kernel<P, Y, REFERENCE>, a);
  check_launch("pair_kernel");
  return true;
}

// Everything in one launch; false: not for these inputs or not on this device.
bool launch_pairs(const Forward& f, void* gradient, int device, cudaStream_t stream) {
  if (attribute_of(cudaDevAttrComputeCapabilityMajor, device) < 9) return false;
  const int64_t most = attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const unsigned blocks = cluster_blocks(f.n, most);
  const Count count(f, 1);
  const PairLoss a{inputs_of(f),         gradient, finish_of(f), count.ticket,
                   share_of(f.n, blocks), blocks};
  bool launched = false;
  vectorised(f.policy.dtype, f.target.dtype, f.n, is_aligned(a.inputs) && is_aligned(gradient),
             [&](auto acc, auto policy, auto target) {
               using P = decltype(policy);
               using Y = decltype(target);
               if constexpr (sizeof(acc) == sizeof(float)) {
                 launched = f.reference.data
                                ? launch_clusters<P, Y, true>(a, most, device, stream)
                                : launch_clusters<P, Y, false>(a, most, device, stream);
               }
             });
  return launched;
}

template <class A>
void launch_unit_gradient(const Forward& f, void* gradient, cudaStream_t stream) {
  launch_gradient<A>({f.policy, f.target, gradient, f.schedule, f.objective, true, nullptr, nullptr,
                      nullptr, static_cast<const A*>(f.logits.data_ptr()), f.pairs, f.n,
                      (f.n + TILE - 1) / TILE},
                     stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_with_gradient_cuda(
    Tensor gradient,           // as policy; gets d loss / d policy
    Tensor policy,             // [2B, C, H, W], or [B, C, H, W] shared by the pair
    OptionalTensor reference,  // as policy, or its errors [2B]
    Tensor target,             // [2B, C, H, W] or [B, C, H, W]
    Tensor timesteps,          // int64 [B] or [2B]
    Tensor weights,            // [T]
    Tensor margins,            // [T]
    double beta, double lose_weight, int64_t link, double label_smoothing) {
  check_devices(policy, reference, target, timesteps, weights, margins);
  check_device(gradient, policy, "gradient");
  const int device = policy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(policy);
  const Forward f = forward_of(policy, reference, target, timesteps, weights, margins,
                               {link, beta, lose_weight, label_smoothing});
  const Tensor out = f.in_order(gradient);
  void* data = out.data_ptr();
  if (!launch_pairs(f, data, device, stream)) {
    launch_forward(f, stream);
    f.wide ? launch_unit_gradient<double>(f, data, stream)
           : launch_unit_gradient<float>(f, data, stream);
  }
  if (out.get() != gradient.get()) torch::stable::copy_(gradient, out);
  return f.outputs();
}

}  // namespace dde_fast

STABLE_TORCH_LIBRARY_IMPL(dde_fast_cpp, CUDA, m) {
  m.impl("preference_loss_with_gradient", TORCH_BOX(&dde_fast::preference_loss_with_gradient_cuda));
}
