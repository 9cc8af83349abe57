// The small convolutions' kernels on tensors, with a max-pool behind them or without.
#pragma once

#include "conv2d_relu/conv2d_relu.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace skinfast {

inline const Tensor planes(const Tensor& x) { return dense(x, MemoryFormat::Contiguous); }

inline std::size_t accumulate_size(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float);
}

// The output [N, K, rows, columns] and, for windows, the position of each maximum.
inline std::tuple<Tensor, Tensor> small_conv2d_cpu(const PooledConv2d& conv, const Tensor& x,
                                                   const Tensor& weight,
                                                   const std::optional<Tensor>& bias,
                                                   bool with_argmax) {
  const DType dtype = dtype_of(x);
  const std::vector<int64_t> shape{conv.N, conv.K, conv.rows(), conv.columns()};
  const MemoryFormat layout = conv2d_layout(x, weight);
  if (conv.N == 0) {
    return {empty_in(x, shape, layout), empty_in(x, shape, layout, ScalarType::Byte)};
  }
  const Tensor input = planes(x);
  const Tensor packed = torch::stable::new_empty(x, {conv.packed_weights()}, accumulate_dtype(x));
  SKINFAST_KERNEL(pack_weight)
  (dtype, conv, planes(weight).const_data_ptr(), packed.mutable_data_ptr());
  std::optional<Tensor> wide_bias;
  if (bias) {
    wide_bias = torch::stable::to(torch::stable::contiguous(*bias), accumulate_dtype(x));
  }
  const Tensor output = empty_in(x, shape, MemoryFormat::Contiguous);
  const Tensor argmax =
      with_argmax ? empty_in(x, shape, MemoryFormat::Contiguous, ScalarType::Byte) : no_tensor(x);
  const auto kernel = SKINFAST_KERNEL(small_conv2d);
  parallel_for(conv.forward_tasks(), 1, [&](int64_t begin, int64_t end) {
    void* scratch =
        thread_scratch(static_cast<std::size_t>(conv.forward_scratch()) * accumulate_size(x));
    kernel(dtype, conv, input.const_data_ptr(), packed.const_data_ptr(),
           wide_bias ? wide_bias->const_data_ptr() : nullptr, output.mutable_data_ptr(),
           with_argmax ? static_cast<uint8_t*>(argmax.mutable_data_ptr()) : nullptr, scratch, begin,
           end);
  });
  return {dense(output, layout), with_argmax ? dense(argmax, layout) : argmax};
}

// The gradients of input, weight and bias that are wanted; argmax of windows.
inline std::tuple<Tensor, Tensor, Tensor> small_conv2d_gradients_cpu(
    const PooledConv2d& conv, const Tensor& grad_output, const Tensor& output, const Tensor* argmax,
    const Tensor& x, const Tensor& weight, const std::array<bool, 3>& wanted) {
  const DType dtype = dtype_of(x);
  const auto [want_input, want_weight, want_bias] = wanted;
  const auto sums = [&](int64_t size) {
    return torch::stable::new_empty(x, {conv.backward_tasks() * size}, accumulate_dtype(x));
  };
  const Tensor stored_grad = planes(grad_output), stored_output = planes(output);
  const Tensor stored_x = planes(x);
  const Tensor stored_argmax = argmax ? planes(*argmax) : no_tensor(x);
  const Tensor weight_sums = want_weight ? sums(conv.weight_sums()) : no_tensor(x);
  const Tensor bias_sums = sums(conv.K);
  const Tensor turned =
      torch::stable::new_empty(x, {conv.K * conv.R * conv.S * kSmallChannels}, accumulate_dtype(x));
  if (want_input) {
    SKINFAST_KERNEL(pack_turned_weight)
    (dtype, conv, planes(weight).const_data_ptr(), turned.mutable_data_ptr());
  }
  const Tensor grad_x =
      want_input ? empty_in(x, shape_of(x), MemoryFormat::Contiguous) : no_tensor(x);
  const SmallConv2dGradients gradients{
      stored_grad.const_data_ptr(),
      stored_output.const_data_ptr(),
      argmax ? static_cast<const uint8_t*>(stored_argmax.const_data_ptr()) : nullptr,
      stored_x.const_data_ptr(),
      turned.const_data_ptr(),
      want_input ? grad_x.mutable_data_ptr() : nullptr,
      want_weight ? weight_sums.mutable_data_ptr() : nullptr,
      bias_sums.mutable_data_ptr()};
  const auto kernel = SKINFAST_KERNEL(small_conv2d_gradients);
  parallel_for(conv.backward_tasks(), 1, [&](int64_t begin, int64_t end) {
    void* scratch =
        thread_scratch(static_cast<std::size_t>(conv.backward_scratch()) * accumulate_size(x));
    kernel(dtype, conv, gradients, scratch, begin, end);
  });
  const Tensor grad_weight =
      want_weight ? torch::stable::new_empty(weight, shape_of(weight)) : no_tensor(x);
  const Tensor grad_bias = torch::stable::new_empty(x, {conv.K});
  const auto sum = SKINFAST_KERNEL(sum_small_conv2d_gradients);
  const int64_t filter_sums = conv.backward_tasks() * conv.weight_sums() / conv.K;
  parallel_for(conv.K, ceil_div(kElementGrain, filter_sums + 1), [&](int64_t begin, int64_t end) {
    sum(dtype, conv, gradients, want_weight ? grad_weight.mutable_data_ptr() : nullptr,
        grad_bias.mutable_data_ptr(), begin, end);
  });
  return {want_input ? dense(grad_x, conv2d_layout(x, weight)) : grad_x,
          want_weight ? dense(grad_weight, layout_of(weight)) : grad_weight,
          want_bias ? grad_bias : no_tensor(x)};
}

}  // namespace skinfast
