#include "conv2d_relu/conv2d_relu_cuda.h"

#include "conv2d/conv2d_cuda.h"

namespace skinfast {
namespace {

// The gradient of an output before its ReLU.
template <typename T>
struct MaskedPixels {
  using A = accumulate_t<T>;
  Strided<const T> grad_output, output;

  __device__ __forceinline__ A value(int n, int c, int h, int w) const {
    return load(relu_gradient(grad_output.at(n, c, h, w), output.at(n, c, h, w)));
  }
};

Tensor conv2d_relu_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_relu", x, weight, bias, arguments);
  if (!is_small_conv2d(x, weight, arguments)) {
    return general_conv2d_cuda(x, weight, bias, std::nullopt, /*with_relu=*/true, shape, arguments);
  }
  Tensor output = empty_in(x, shape, conv2d_layout(x, weight));
  if (output.numel() == 0) return output;
  const DeviceGuard guard(x.get_device_index());
  const SmallConv2d conv = small_conv2d_of(x, weight, shape, arguments);
  const Tensor dense_weight = dense(weight, MemoryFormat::Contiguous);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
    launch_convolution<T>(conv, stored_pixels<T>(x), dense_weight, false, dense_bias,
                          StoredResult<T>{strided<T>(output), true});
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_backward_cuda(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_relu_backward", x, weight, std::nullopt, arguments);
  check_conv2d_gradient("conv2d_relu_backward", "grad_output", grad_output, x, shape);
  check_conv2d_gradient("conv2d_relu_backward", "output", output, x, shape);
  if (!is_small_conv2d(x, weight, arguments) || output.numel() == 0) {
    return general_conv2d_backward_cuda(relu_masked(grad_output, output), x, weight, arguments,
                                        {want_input, want_weight, want_bias});
  }
  const SmallConv2d conv = small_conv2d_of(x, weight, shape, arguments);
  const DeviceGuard guard(x.get_device_index());
  std::tuple<Tensor, Tensor, Tensor> gradients{no_tensor(x), no_tensor(x), no_tensor(x)};
  SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
    const MaskedPixels<T> masked{strided_const<T>(grad_output), strided_const<T>(output)};
    gradients =
        small_conv2d_gradients<T>(conv, masked, x, weight, {want_input, want_weight, want_bias});
  });
  return gradients;
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu_cuda));
  m.impl("conv2d_relu_backward", TORCH_BOX(&conv2d_relu_backward_cuda));
}

}  // namespace skinfast
