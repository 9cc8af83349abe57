#include "batch_norm_relu/batch_norm_cuda_launch.h"

namespace skinfast {
namespace {

FourTensors batch_norm_relu_cuda(const Tensor& x, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, bool training, double eps,
                                 bool relu, const OptionalTensor& statistics) {
  return batch_norm_forward_cuda({"batch_norm_relu", x, std::nullopt, weight, bias, running_mean,
                                  running_var, training, eps, relu, statistics});
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward_cuda(
    const Tensor& grad_output, const Tensor& x, const Tensor& mask, const Tensor& mean,
    const Tensor& variance, const OptionalTensor& weight, bool training, double eps,
    bool needs_grad_x) {
  const auto [grad_x, grad_residual, grad_weight, grad_bias] =
      batch_norm_backward_cuda({"batch_norm_relu_backward", grad_output, x, mask, mean, variance,
                                weight, training, eps, needs_grad_x, false});
  return {grad_x, grad_weight, grad_bias};
}

void batch_norm_update_cuda(const Tensor& running_mean, const Tensor& running_var,
                            const Tensor& mean, const Tensor& variance, int64_t count,
                            double momentum) {
  batch_norm_update_host(
      running_mean, running_var, mean, variance, count,
      [&](const Tensor& batch_mean, const Tensor& batch_variance, double unbiased) {
        const DeviceGuard guard(mean.get_device_index());
        const int64_t channels = mean.numel();
        SKINFAST_CUDA_DISPATCH(dtype_of(running_mean), T, {
          using A = accumulate_t<T>;
          const auto statistic = [](const Tensor& running, const Tensor& batch, double factor) {
            return RunningStatistic<T>{
                static_cast<T*>(running.mutable_data_ptr()), running.stride(0),
                static_cast<const A*>(batch.const_data_ptr()), static_cast<A>(factor)};
          };
          launch(&update_kernel<T>, dim3(static_cast<unsigned>(ceil_divide(channels, kThreads))),
                 kThreads, 0, current_stream(mean), statistic(running_mean, batch_mean, 1.0),
                 statistic(running_var, batch_variance, unbiased), momentum, channels);
        });
      });
}

}  // namespace

FourTensors batch_norm_forward_cuda(const BatchNormInputs& inputs) {
  check_elements(inputs.op, inputs.x);
  return batch_norm_forward_host(inputs, [](BatchNormForward& call, const Tensor& x) {
    const DeviceGuard guard(x.get_device_index());
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      set_forward_coefficients<T>(call, x);
      apply(ForwardPass<T>{call}, x, call.x, call.residual, call.output);
    });
  });
}

FourTensors batch_norm_backward_cuda(const BatchNormBackwardInputs& inputs) {
  check_elements(inputs.op, inputs.x);
  SKINFAST_CHECK(!inputs.other_grad_output.has_value(), inputs.op,
                 ": other_grad_output is given; on CUDA add it to grad_output beforehand");
  return batch_norm_backward_host(inputs, [](BatchNormBackward& call, const Tensor& x) {
    const DeviceGuard guard(x.get_device_index());
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      const StoredGradient<T> gradient{static_cast<const T*>(call.grad_output), call.mask};
      reduce<T>(BackwardReduction<T, StoredGradient<T>>{call, gradient}, x, call.grad_output,
                call.x);
      if (call.grad_x == nullptr) return;
      apply(BackwardPass<T, StoredGradient<T>>{call, gradient}, x, call.grad_output, call.x,
            call.grad_x, call.grad_residual);
    });
  });
}

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu_cuda));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward_cuda));
  m.impl("batch_norm_update_", TORCH_BOX(&batch_norm_update_cuda));
}

}  // namespace skinfast
