#include "add_relu/add_relu.h"

namespace skinfast::SKINFAST_ISA {

void add_relu(DType dtype, const void* x, const void* residual, void* output, int64_t begin,
              int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const T* __restrict px = static_cast<const T*>(x);
    const T* __restrict pr = static_cast<const T*>(residual);
    T* __restrict po = static_cast<T*>(output);
    for (int64_t i = begin; i < end; ++i) po[i] = add_relu_value(px[i], pr[i]);
  });
}

void add_relu_backward(DType dtype, const void* output, const void* grad_output, void* grad,
                       int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const T* __restrict pg = static_cast<const T*>(grad_output);
    const T* __restrict po = static_cast<const T*>(output);
    T* __restrict pr = static_cast<T*>(grad);
    for (int64_t i = begin; i < end; ++i) pr[i] = relu_gradient(pg[i], po[i]);
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

Tensor add_relu_cpu(const Tensor& x, const Tensor& residual) {
  return add_relu_host("add_relu", "x", x, "residual", residual,
                       [](const Tensor& x, const Tensor& residual, const Tensor& output) {
                         parallel_for(x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
                           SKINFAST_KERNEL(add_relu)
                           (dtype_of(x), x.const_data_ptr(), residual.const_data_ptr(),
                            output.mutable_data_ptr(), begin, end);
                         });
                       });
}

Tensor add_relu_backward_cpu(const Tensor& grad_output, const Tensor& output) {
  return add_relu_host("add_relu_backward", "output", output, "grad_output", grad_output,
                       [](const Tensor& output, const Tensor& grad_output, const Tensor& grad) {
                         parallel_for(
                             output.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
                               SKINFAST_KERNEL(add_relu_backward)
                               (dtype_of(output), output.const_data_ptr(),
                                grad_output.const_data_ptr(), grad.mutable_data_ptr(), begin, end);
                             });
                       });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&add_relu_cpu));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward_cpu));
}

}  // namespace skinfast
#endif
