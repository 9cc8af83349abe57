// Threads on the CPU: PyTorch's own pool, so torch.set_num_threads governs it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace skinfast {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kElementGrain = 16384;

// Call body(begin, end) on disjoint ranges that cover [0, count); nothing for count 0.
// Where the ranges are cut depends on the number of threads, so a reduction must not: reduce
// fixed-size blocks and add their results in order.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace skinfast
