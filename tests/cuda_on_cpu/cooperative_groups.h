// Clusters of the emulated CUDA.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void barrier_arrive() const {
    emulator::Block& b = *emulator::block;
    b.fibers[b.current].cluster_turn =
        emulator::arrive(b.cluster->barrier, b.cluster->blocks * b.cluster->threads);
  }
  void barrier_wait() const {
    emulator::Block& b = *emulator::block;
    emulator::wait(b.cluster->barrier, b.fibers[b.current].cluster_turn);
  }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  template <class T>
  T* map_shared_rank(T* data, int rank) const {
    const emulator::Block& b = *emulator::block;
    const auto offset = reinterpret_cast<char*>(data) - b.cluster->shared[b.rank].data();
    return reinterpret_cast<T*>(b.cluster->shared[rank].data() + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
