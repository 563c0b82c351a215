// Running a vector loop's tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu.h"

namespace dde_fast {

inline void run(Loop loop, const void* task, int64_t tasks) {
  torch::stable::parallel_for(
      0, tasks, GRAIN, [=](int64_t begin, int64_t end) { loop(task, begin, end); });
}

}  // namespace dde_fast
