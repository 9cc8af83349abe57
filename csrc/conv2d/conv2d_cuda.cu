#include "conv2d/conv2d_cuda.h"
#include "core/cuda.h"

#ifdef SKINFAST_CUTLASS
#include "conv2d/conv2d_weight_gradient_host.h"
#endif

namespace skinfast {

Tensor general_conv2d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, bool with_relu,
                           [[maybe_unused]] const std::vector<int64_t>& shape,
                           const Conv2dArguments& arguments) {
#ifdef SKINFAST_CUTLASS
  if (const auto output =
          tensor_core_conv2d(x, weight, bias, residual, with_relu, shape, arguments)) {
    return *output;
  }
#endif
  const Tensor output = aten_conv2d(x, weight, bias, arguments);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(output)};
  if (residual) {
    stack[1] = torch::stable::detail::from(*residual);
    return call_aten(SKINFAST_OP("add_relu"), "", stack.data());
  }
  return with_relu ? call_aten("aten::relu_", "", stack.data()) : output;
}

std::tuple<Tensor, Tensor, Tensor> general_conv2d_backward_cuda(const Tensor& grad_output,
                                                                const Tensor& x,
                                                                const Tensor& weight,
                                                                const Conv2dArguments& arguments,
                                                                const std::array<bool, 3>& wanted) {
  auto [want_input, want_weight, want_bias] = wanted;
  std::optional<Tensor> grad_x, grad_weight;
#ifdef SKINFAST_CUTLASS
  if (want_input) grad_x = tensor_core_input_gradient(grad_output, x, weight, arguments);
  if (want_weight) grad_weight = tensor_core_weight_gradient(grad_output, x, weight, arguments);
  want_input = want_input && !grad_x;
  want_weight = want_weight && !grad_weight;
  if (!want_input && !want_weight && !want_bias) {
    return {grad_x.value_or(no_tensor(x)), grad_weight.value_or(no_tensor(x)), no_tensor(x)};
  }
#endif
  const auto [aten_x, aten_weight, grad_bias] =
      aten_conv2d_backward(grad_output, x, weight, arguments, {want_input, want_weight, want_bias});
  return {grad_x.value_or(aten_x), grad_weight.value_or(aten_weight), grad_bias};
}

namespace {

Tensor conv2d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d", x, weight, bias, arguments);
  return general_conv2d_cuda(x, weight, bias, std::nullopt, /*with_relu=*/false, shape, arguments);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                                        const Tensor& weight,
                                                        const std::vector<int64_t>& stride,
                                                        const std::vector<int64_t>& padding,
                                                        const std::vector<int64_t>& dilation,
                                                        int64_t groups, bool want_input,
                                                        bool want_weight, bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_backward", x, weight, std::nullopt, arguments);
  check_conv2d_gradient("conv2d_backward", "grad_output", grad_output, x, shape);
  return general_conv2d_backward_cuda(grad_output, x, weight, arguments,
                                      {want_input, want_weight, want_bias});
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_cuda));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward_cuda));
}

}  // namespace skinfast
