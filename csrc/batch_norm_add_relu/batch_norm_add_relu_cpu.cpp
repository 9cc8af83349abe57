// The kernels are those of batch_norm_relu_cpu.cpp.
#include "batch_norm_add_relu/batch_norm_add_relu.h"

#ifdef SKINFAST_HOST_CODE
namespace skinfast {

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("batch_norm_add_relu", TORCH_BOX(&batch_norm_add_relu_host<&batch_norm_forward_cpu>));
  m.impl("batch_norm_add_relu_backward",
         TORCH_BOX(&batch_norm_add_relu_backward_host<&batch_norm_backward_cpu>));
}

}  // namespace skinfast
#endif
