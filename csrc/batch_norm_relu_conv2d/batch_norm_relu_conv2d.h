// output = conv2d(relu(batch_norm(x)), weight): two layers as one op, for the sake of the gradient.
//
// Forward, and backward where nothing else is said, it is composed of the ops of the two. Where
// tensor cores give the gradient of the convolution's input (CUDA, as the table of choices says),
// the same kernel masks it by the ReLU and leaves the two sums of the batch norm's backward pass,
// which then has no need of a pass of its own for them.
#pragma once

#include "batch_norm_relu/batch_norm_relu.h"
#include "conv2d/conv2d.h"
#include "conv2d_statistics/conv2d_statistics.h"

namespace skinfast {

// From sums of grad and of grad * x over the channel, grad taken behind the ReLU; see
// set_backward_channel.
template <typename A>
SKINFAST_HOST_DEVICE void set_backward_channel(const BatchNormBackward& a, int64_t channel,
                                               ChannelSums sums) {
  const double mean = static_cast<const A*>(a.mean)[channel];
  set_backward_channel<A>(a, channel, sums.sum, sums.products - mean * sums.sum);
}

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "batch_norm_relu/batch_norm_host.h"

namespace skinfast {

// output [N, K, P, Q]; its statistics [2, K], or empty if not wanted; then batch_norm_relu's four.
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline SixTensors batch_norm_relu_conv2d(const Tensor& x, const Tensor& weight,
                                         const OptionalTensor& norm_weight,
                                         const OptionalTensor& norm_bias,
                                         const OptionalTensor& running_mean,
                                         const OptionalTensor& running_var, bool training,
                                         double eps, const std::vector<int64_t>& stride,
                                         const std::vector<int64_t>& padding,
                                         const std::vector<int64_t>& dilation, int64_t groups,
                                         bool want_statistics, const OptionalTensor& statistics) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const char* op = "batch_norm_relu_conv2d";
  check_conv2d(op, x, weight, std::nullopt, {stride, padding, dilation, groups});
  check_vector(op, "norm_weight", norm_weight, x);
  check_vector(op, "norm_bias", norm_bias, x);
  std::array<StableIValue, 9> norm{
      from(x),        from(norm_weight), from(norm_bias),     from(running_mean), from(running_var),
      from(training), from(eps),         from(/*relu=*/true), from(statistics)};
  const Tensor normalized = call_aten(SKINFAST_OP("batch_norm_relu"), "", norm.data());
  const Tensor mask = to<Tensor>(norm[1]), mean = to<Tensor>(norm[2]),
               variance = to<Tensor>(norm[3]);
  if (want_statistics) {
    std::array<StableIValue, 6> conv{from(normalized), from(weight),   from(stride),
                                     from(padding),    from(dilation), from(groups)};
    const Tensor output = call_aten(SKINFAST_OP("conv2d_statistics"), "", conv.data());
    return {output, to<Tensor>(conv[1]), normalized, mask, mean, variance};
  }
  const OptionalTensor no_bias;
  std::array<StableIValue, 7> conv{from(normalized), from(weight),   from(no_bias), from(stride),
                                   from(padding),    from(dilation), from(groups)};
  const Tensor output = call_aten(SKINFAST_OP("conv2d"), "", conv.data());
  return {output, torch::stable::new_empty(mean, {0}), normalized, mask, mean, variance};
}

// --- gradient ------------------------------------------------------------------------------------

struct BatchNormReLUConv2dBackward {
  const Tensor& grad_output;  // [N, K, P, Q]
  const Tensor& normalized;   // [N, C, H, W]: what the convolution was of
  const Tensor& weight;
  const Tensor& x;  // [N, C, H, W]
  const Tensor &mask, &mean, &variance;
  const OptionalTensor& norm_weight;
  bool training;
  double eps;
  Conv2dArguments arguments;
  bool want_input, want_weight;
};

inline void check_backward(const BatchNormReLUConv2dBackward& in) {
  const char* op = "batch_norm_relu_conv2d_backward";
  const auto shape = check_conv2d(op, in.x, in.weight, std::nullopt, in.arguments);
  check_conv2d_gradient(op, "grad_output", in.grad_output, in.x, shape);
  check_conv2d_gradient(op, "normalized", in.normalized, in.x, shape_of(in.x));
  check_same_device(op, "mask", in.mask, "input", in.x);
  check_dtype(op, "mask", in.mask, ScalarType::Byte);
  check_shape(op, "mask", in.mask, {mask_bytes(in.x)});
}

// Of the convolution's input and weight; what is not wanted is empty.
inline std::tuple<Tensor, Tensor> conv2d_gradients(const BatchNormReLUConv2dBackward& in,
                                                   bool want_input) {
  using torch::stable::detail::from;
  std::array<StableIValue, 10> stack{
      from(in.grad_output),      from(in.normalized),        from(in.weight),
      from(in.arguments.stride), from(in.arguments.padding), from(in.arguments.dilation),
      from(in.arguments.groups), from(want_input),           from(in.want_weight),
      from(/*want_bias=*/false)};
  const Tensor first = call_aten(SKINFAST_OP("conv2d_backward"), "", stack.data());
  const Tensor second = torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);  // takes the empty one over, to free it
  return {first, second};
}

// The gradients of x, weight, norm_weight and norm_bias.
inline FourTensors composed_backward(const BatchNormReLUConv2dBackward& in) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const auto [grad, grad_weight] = conv2d_gradients(in, /*want_input=*/true);
  std::array<StableIValue, 9> stack{from(grad),        from(in.x),        from(in.mask),
                                    from(in.mean),     from(in.variance), from(in.norm_weight),
                                    from(in.training), from(in.eps),      from(in.want_input)};
  const Tensor grad_x = call_aten(SKINFAST_OP("batch_norm_relu_backward"), "", stack.data());
  return {grad_x, grad_weight, to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

}  // namespace skinfast
#endif
