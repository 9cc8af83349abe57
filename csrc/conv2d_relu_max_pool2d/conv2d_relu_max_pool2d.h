// output = max_pool2d(relu(conv2d(x, weight) + bias), pool_size): what both backends share.
//
// The convolution's own output is never kept: the gradient needs the pooled output and, for each of
// its elements, the position of the maximum. Small convolutions on the CPU run on the kernels of
// csrc/conv2d_relu; everything else is composed of the ops it is made of.
#pragma once

#ifdef SKINFAST_HOST_CODE
#include "conv2d_relu/conv2d_relu.h"

namespace skinfast {

struct PooledConv2dCall {
  Conv2dArguments arguments;
  std::vector<int64_t> convolved;  // the shape [N, K, P, Q] before pooling
  std::vector<int64_t> shape;      // and behind it
  PoolWindow window;
};

inline PooledConv2dCall check_conv2d_relu_max_pool2d(const char* op, const Tensor& x,
                                                     const Tensor& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const std::vector<int64_t>& padding,
                                                     const std::vector<int64_t>& pool_size) {
  PooledConv2dCall call{{{1, 1}, padding, {1, 1}, 1}, {}, {}, {}};
  call.convolved = check_conv2d(op, x, weight, bias, call.arguments);
  SKINFAST_CHECK(pool_size.size() == 2, op, ": pool_size has ", pool_size.size(),
                 " values; it needs 2");
  call.shape = call.convolved;
  for (size_t i = 0; i < 2; ++i) {
    SKINFAST_CHECK(pool_size[i] >= 1 && pool_size[i] <= call.convolved[2 + i], op,
                   ": pool_size has ", pool_size[i], " for a map of ", call.convolved[2 + i],
                   "; it needs at least 1 and at most that");
    call.shape[2 + i] /= pool_size[i];
  }
  call.window = {pool_size[0], pool_size[1]};
  SKINFAST_CHECK(call.window.size() <= 255, op, ": pool_size has ", call.window.size(),
                 " positions; it needs at most 255, since a position is kept in one byte");
  return call;
}

inline std::tuple<Tensor, Tensor> composed_conv2d_relu_max_pool2d(const Tensor& x,
                                                                  const Tensor& weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  const PooledConv2dCall& call) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (x.size(0) == 0) {
    const MemoryFormat layout = conv2d_layout(x, weight);
    return {empty_in(x, call.shape, layout), empty_in(x, call.shape, layout, ScalarType::Byte)};
  }
  const std::vector<int64_t> window{call.window.height, call.window.width};
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  std::array<StableIValue, 7> convolution{from(x),
                                          from(weight),
                                          from(bias),
                                          from(call.arguments.stride),
                                          from(call.arguments.padding),
                                          from(call.arguments.dilation),
                                          from(call.arguments.groups)};
  std::array<StableIValue, 6> pool{
      from(call_aten(SKINFAST_OP("conv2d_relu"), "", convolution.data())),
      from(window),
      from(window),
      from(zeros),
      from(ones),
      from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(SKINFAST_OP("max_pool2d"), "", pool.data(), TORCH_ABI_VERSION));
  const Tensor output = to<Tensor>(pool[0]), argmax = to<Tensor>(pool[1]);
  return {output, argmax};
}

// The gradient of the convolution's output, before its ReLU.
inline Tensor unpooled_gradient(const Tensor& grad_output, const Tensor& output,
                                const Tensor& argmax, const PooledConv2dCall& call,
                                MemoryFormat layout) {
  using torch::stable::detail::from;
  const std::vector<int64_t> window{call.window.height, call.window.width};
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  std::array<StableIValue, 9> stack{from(relu_masked(grad_output, output)),
                                    from(argmax),
                                    from(call.convolved),
                                    from(window),
                                    from(window),
                                    from(zeros),
                                    from(ones),
                                    from(false),
                                    from(layout == MemoryFormat::ChannelsLast)};
  return call_aten(SKINFAST_OP("max_pool2d_backward"), "", stack.data());
}

// Check what a backward call gets besides the forward call's arguments.
inline void check_pooled_gradient(const char* op, const Tensor& grad_output, const Tensor& output,
                                  const Tensor& argmax, const Tensor& x,
                                  const PooledConv2dCall& call) {
  check_conv2d_gradient(op, "grad_output", grad_output, x, call.shape);
  check_conv2d_gradient(op, "output", output, x, call.shape);
  check_shape(op, "argmax", argmax, call.shape);
  check_dtype(op, "argmax", argmax, ScalarType::Byte);
  check_same_device(op, "argmax", argmax, "input", x);
}

}  // namespace skinfast
#endif
