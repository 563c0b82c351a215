// What the CUDA launchers share: the current stream, grids, checks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "elements.cuh"
#include "tensors.h"

namespace dde_fast {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  // not STABLE_TORCH_ERROR_CODE_CHECK, which torch has only from 2.13 on
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

// one block per (pair, part of its row)
inline unsigned blocks_of(int64_t pairs, int64_t parts) {
  STD_TORCH_CHECK(pairs * parts < (int64_t{1} << 31), "policy: too large a batch, ", pairs,
                  " pairs");
  return static_cast<unsigned>(pairs * parts);
}

inline void check_device(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  ": expected on the device of the first tensor");
}

}  // namespace dde_fast
