// The kernels are those of batch_norm_relu_cuda.cu.
#include "batch_norm_add_relu/batch_norm_add_relu.h"
#include "core/cuda.h"

namespace skinfast {

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_add_relu", TORCH_BOX(&batch_norm_add_relu_host<&batch_norm_forward_cuda>));
  m.impl("batch_norm_add_relu_backward",
         TORCH_BOX(&batch_norm_add_relu_backward_host<&batch_norm_backward_cuda>));
}

}  // namespace skinfast
