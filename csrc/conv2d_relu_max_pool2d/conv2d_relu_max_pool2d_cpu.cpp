#include "conv2d_relu_max_pool2d/conv2d_relu_max_pool2d.h"

#ifdef SKINFAST_HOST_CODE
#include "conv2d_relu/conv2d_relu_small_cpu.h"

namespace skinfast {
namespace {

std::tuple<Tensor, Tensor> conv2d_relu_max_pool2d_cpu(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>& bias,
                                                      const std::vector<int64_t>& padding,
                                                      const std::vector<int64_t>& pool_size) {
  const PooledConv2dCall call =
      check_conv2d_relu_max_pool2d("conv2d_relu_max_pool2d", x, weight, bias, padding, pool_size);
  if (!is_small_conv2d(x, weight, call.arguments)) {
    return composed_conv2d_relu_max_pool2d(x, weight, bias, call);
  }
  const PooledConv2d conv{small_conv2d_of(x, weight, call.convolved, call.arguments), call.window};
  return small_conv2d_cpu(conv, x, weight, bias, /*with_argmax=*/true);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_max_pool2d_backward_cpu(
    const Tensor& grad_output, const Tensor& output, const Tensor& argmax, const Tensor& x,
    const Tensor& weight, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& pool_size, bool want_input, bool want_weight, bool want_bias) {
  constexpr const char* op = "conv2d_relu_max_pool2d_backward";
  const PooledConv2dCall call =
      check_conv2d_relu_max_pool2d(op, x, weight, std::nullopt, padding, pool_size);
  check_pooled_gradient(op, grad_output, output, argmax, x, call);
  const std::array<bool, 3> wanted{want_input, want_weight, want_bias};
  if (!is_small_conv2d(x, weight, call.arguments) || x.size(0) == 0) {
    const Tensor gradient =
        unpooled_gradient(grad_output, output, argmax, call, conv2d_layout(x, weight));
    return aten_conv2d_backward(gradient, x, weight, call.arguments, wanted);
  }
  const PooledConv2d conv{small_conv2d_of(x, weight, call.convolved, call.arguments), call.window};
  return small_conv2d_gradients_cpu(conv, grad_output, output, &argmax, x, weight, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("conv2d_relu_max_pool2d", TORCH_BOX(&conv2d_relu_max_pool2d_cpu));
  m.impl("conv2d_relu_max_pool2d_backward", TORCH_BOX(&conv2d_relu_max_pool2d_backward_cpu));
}

}  // namespace skinfast
#endif
