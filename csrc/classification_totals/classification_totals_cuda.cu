#include "classification_totals/classification_totals.h"
#include "core/cuda.h"

namespace skinfast {
namespace {

// One block: a batch has few rows, and a second launch would cost more than their sum.
template <typename T, typename L>
__global__ void __launch_bounds__(kThreads, 2)
    classification_totals_kernel(double* __restrict__ totals, const L* __restrict__ mean_loss,
                                 const T* __restrict__ logits, const int64_t* __restrict__ labels,
                                 int64_t rows, int64_t classes) {
  __shared__ int64_t counts[kThreads];
  int64_t count = 0;
  for (int64_t n = threadIdx.x; n < rows; n += kThreads) {
    count += is_correct(logits + n * classes, classes, labels[n]);
  }
  counts[threadIdx.x] = count;
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < distance) {
      counts[threadIdx.x] += counts[threadIdx.x + distance];
    }
  }
  if (threadIdx.x != 0) return;
  totals[0] += static_cast<double>(load(*mean_loss)) * static_cast<double>(rows);
  totals[1] += static_cast<double>(counts[0]);
  totals[2] += static_cast<double>(rows);
}

void classification_totals_cuda(const Tensor& totals, const Tensor& mean_loss, const Tensor& logits,
                                const Tensor& labels) {
  check_classification_totals(totals, mean_loss, logits, labels);
  const int64_t rows = logits.size(0);
  if (rows == 0) return;
  const DeviceGuard guard(totals.get_device_index());
  const Tensor stored = dense(logits, MemoryFormat::Contiguous);
  const Tensor stored_labels = dense(labels, MemoryFormat::Contiguous);
  SKINFAST_CUDA_DISPATCH(dtype_of(logits), T, {
    SKINFAST_CUDA_DISPATCH(dtype_of(mean_loss), L, {
      launch(&classification_totals_kernel<T, L>, 1, kThreads, 0, current_stream(totals),
             static_cast<double*>(totals.mutable_data_ptr()),
             static_cast<const L*>(mean_loss.const_data_ptr()),
             static_cast<const T*>(stored.const_data_ptr()),
             static_cast<const int64_t*>(stored_labels.const_data_ptr()), rows, logits.size(1));
    });
  });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("classification_totals_", TORCH_BOX(&classification_totals_cuda));
}

}  // namespace skinfast
