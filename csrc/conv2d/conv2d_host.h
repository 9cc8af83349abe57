// Checks, layouts and ATen's convolution: what conv2d and conv2d_relu share on both backends.
#pragma once

#include <array>

#include "core/isa.h"
#include "core/tensor.h"

namespace skinfast {

struct Conv2dArguments {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

// The layout that ATen's convolution computes in: channels_last as soon as either operand is.
inline MemoryFormat conv2d_layout(const Tensor& x, const Tensor& weight) {
  return layout_of(x) == MemoryFormat::ChannelsLast ? MemoryFormat::ChannelsLast
                                                    : layout_of(weight);
}

// Check all arguments; return the shape [N, K, P, Q] of the output.
inline std::vector<int64_t> check_conv2d(const char* op, const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const Conv2dArguments& arguments) {
  check_floating(op, "input", x);
  check_dim(op, "input", x, 4, "[N, C, H, W]");
  check_dim(op, "weight", weight, 4, "[K, C / groups, R, S]");
  check_same_device(op, "weight", weight, "input", x);
  check_same_dtype(op, "weight", weight, "input", x);
  SKINFAST_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": input has shape ",
                 shape_string(x), "; it needs at least one channel, and a map that is not empty");
  for (const auto& [name, values] :
       {std::pair{"stride", &arguments.stride}, std::pair{"padding", &arguments.padding},
        std::pair{"dilation", &arguments.dilation}}) {
    SKINFAST_CHECK(values->size() == 2, op, ": ", name, " has ", values->size(),
                   " values; it needs 2");
  }
  SKINFAST_CHECK(arguments.groups > 0, op, ": groups is ", arguments.groups,
                 "; it needs to be positive");
  SKINFAST_CHECK(weight.size(1) * arguments.groups == x.size(1), op, ": weight has shape ",
                 shape_string(weight), " and groups is ", arguments.groups, "; input has ",
                 x.size(1), " channels and needs weight.size(1) * groups to equal that");
  SKINFAST_CHECK(weight.size(0) > 0 && weight.size(0) % arguments.groups == 0, op, ": weight has ",
                 weight.size(0), " filters; they need to divide into ", arguments.groups,
                 " groups");
  if (bias) {
    check_same_device(op, "bias", *bias, "input", x);
    check_same_dtype(op, "bias", *bias, "input", x);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  std::vector<int64_t> shape{x.size(0), weight.size(0), 0, 0};
  for (int i = 0; i < 2; ++i) {
    const int64_t stride = arguments.stride[i], padding = arguments.padding[i],
                  dilation = arguments.dilation[i], kernel = weight.size(2 + i);
    SKINFAST_CHECK(stride > 0 && dilation > 0 && padding >= 0 && kernel > 0, op, ": stride ",
                   stride, ", padding ", padding, ", dilation ", dilation, ", kernel ", kernel,
                   "; stride, dilation and kernel need to be positive, padding at least 0");
    const int64_t extent = x.size(2 + i) + 2 * padding - dilation * (kernel - 1) - 1;
    SKINFAST_CHECK(extent >= 0, op, ": input has shape ", shape_string(x), "; with padding ",
                   padding, " it is smaller than the kernel (", dilation * (kernel - 1) + 1, ")");
    shape[2 + i] = extent / stride + 1;
  }
  return shape;
}

// A tensor that must be as the output is: its gradient, or itself.
inline void check_conv2d_gradient(const char* op, const char* name, const Tensor& tensor,
                                  const Tensor& x, const std::vector<int64_t>& shape) {
  check_shape(op, name, tensor, shape);
  check_same_dtype(op, name, tensor, "input", x);
  check_same_device(op, name, tensor, "input", x);
}

// The numbers of a float32 tensor.
inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline Tensor permute(const Tensor& tensor, const std::vector<int64_t>& order) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(order)};
  return call_aten("aten::permute", "", stack.data());
}

// Whether libraries have no kernels of bfloat16 for this CPU: theirs then take ten times as long as
// those of float32, to which it converts exactly, and round sums on the way.
inline bool wants_float32(const Tensor& x) {
  return x.is_cpu() && dtype_of(x) == DType::kBFloat16 && cpu_isa() <= Isa::kAvx2;
}

inline Tensor to_float32(const Tensor& x) { return torch::stable::to(x, ScalarType::Float); }

inline std::optional<Tensor> to_float32(const std::optional<Tensor>& x) {
  return x ? std::optional(to_float32(*x)) : std::nullopt;
}

inline std::tuple<Tensor, Tensor, Tensor> to_dtype(const std::tuple<Tensor, Tensor, Tensor>& all,
                                                   ScalarType dtype) {
  const auto& [first, second, third] = all;
  return {torch::stable::to(first, dtype), torch::stable::to(second, dtype),
          torch::stable::to(third, dtype)};
}

// ATen's convolution; channels_last where either operand is.
inline Tensor aten_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Conv2dArguments& arguments) {
  if (wants_float32(x)) {
    return torch::stable::to(
        aten_conv2d(to_float32(x), to_float32(weight), to_float32(bias), arguments),
        x.scalar_type());
  }
  using torch::stable::detail::from;
  const MemoryFormat layout = conv2d_layout(x, weight);
  const std::vector<int64_t> no_output_padding{0, 0};
  std::array<StableIValue, 9> stack{from(dense(x, layout)),
                                    from(weight),
                                    from(bias),
                                    from(arguments.stride),
                                    from(arguments.padding),
                                    from(arguments.dilation),
                                    from(false),
                                    from(no_output_padding),
                                    from(arguments.groups)};
  return dense(call_aten("aten::convolution", "", stack.data()), layout);
}

inline std::tuple<Tensor, Tensor, Tensor> aten_conv2d_backward(const Tensor& grad_output,
                                                               const Tensor& x,
                                                               const Tensor& weight,
                                                               const Conv2dArguments& arguments,
                                                               const std::array<bool, 3>& wanted) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (!wanted[0] && !wanted[1] && !wanted[2]) return {no_tensor(x), no_tensor(x), no_tensor(x)};
  if (wants_float32(x)) {
    return to_dtype(aten_conv2d_backward(to_float32(grad_output), to_float32(x), to_float32(weight),
                                         arguments, wanted),
                    x.scalar_type());
  }
  const MemoryFormat layout = conv2d_layout(x, weight);
  const std::vector<int64_t> no_output_padding{0, 0};
  const std::optional<std::vector<int64_t>> bias_shape{{weight.size(0)}};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted.data(), wanted.size());
  std::array<StableIValue, 11> stack{from(dense(grad_output, layout)),
                                     from(dense(x, layout)),
                                     from(weight),
                                     from(bias_shape),
                                     from(arguments.stride),
                                     from(arguments.padding),
                                     from(arguments.dilation),
                                     from(false),
                                     from(no_output_padding),
                                     from(arguments.groups),
                                     from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor grad_x = to<Tensor>(stack[0]), grad_weight = to<Tensor>(stack[1]),
               grad_bias = to<Tensor>(stack[2]);
  return {wanted[0] ? dense(grad_x, layout) : no_tensor(x),
          wanted[1] ? dense(grad_weight, layout_of(weight)) : no_tensor(x),
          wanted[2] ? grad_bias : no_tensor(x)};
}

}  // namespace skinfast
