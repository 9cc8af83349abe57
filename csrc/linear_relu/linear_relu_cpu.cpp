#include "linear_relu/linear_relu.h"

namespace skinfast::SKINFAST_ISA {

void mask_and_sum_columns(DType dtype, int64_t M, int64_t N, const void* grad_output,
                          const void* output, void* masked, void* grad_bias, int64_t begin,
                          int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumnBlock;
      const int64_t columns = N - first < kColumnBlock ? N - first : kColumnBlock;
      double sum[kColumnBlock] = {};
      for (int64_t m = 0; m < M; ++m) {
        const T* __restrict g = static_cast<const T*>(grad_output) + m * N + first;
        const T* __restrict y = static_cast<const T*>(output) + m * N + first;
        T* __restrict result = static_cast<T*>(masked) + m * N + first;
        for (int64_t i = 0; i < columns; ++i) {
          result[i] = relu_gradient(g[i], y[i]);
          sum[i] += load(result[i]);
        }
      }
      T* bias = static_cast<T*>(grad_bias) + first;
      for (int64_t i = 0; i < columns; ++i) bias[i] = store<T>(accumulate_t<T>(sum[i]));
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward_cpu(const Tensor& grad_output,
                                                            const Tensor& output, const Tensor& x,
                                                            const Tensor& weight, bool want_input,
                                                            bool want_weight, bool want_bias) {
  return linear_relu_backward(
      grad_output, output, x, weight, want_input, want_weight, want_bias,
      [](const Tensor& grad_output, const Tensor& output, const Tensor& masked,
         const Tensor& grad_bias) {
        const int64_t M = masked.size(0), N = masked.size(1);
        const auto kernel = SKINFAST_KERNEL(mask_and_sum_columns);
        const int64_t grain = kElementGrain / (M * kColumnBlock) + 1;
        parallel_for((N + kColumnBlock - 1) / kColumnBlock, grain, [&](int64_t begin, int64_t end) {
          kernel(dtype_of(masked), M, N, grad_output.const_data_ptr(), output.const_data_ptr(),
                 masked.mutable_data_ptr(), grad_bias.mutable_data_ptr(), begin, end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("linear_relu", TORCH_BOX(&linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&linear_relu_backward_cpu));
}

}  // namespace skinfast
#endif
