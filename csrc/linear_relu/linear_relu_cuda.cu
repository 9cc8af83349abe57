#include "core/cuda.h"
#include "core/relu.h"
#include "linear_relu/linear_relu.h"

namespace skinfast {
namespace {

constexpr int kRows = kThreads / kWarpSize;

// A block covers 32 columns: a warp reads a row of them, kRows warps take turns with the rows, and
// their sums are added in the warps' order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mask_and_sum_columns_kernel(int64_t M, int64_t N, const T* __restrict__ grad_output,
                                const T* __restrict__ output, T* __restrict__ masked,
                                T* __restrict__ grad_bias) {
  using A = accumulate_t<T>;
  __shared__ A sums[kRows][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  A sum = 0;
  if (column < N) {
    for (int64_t m = warp; m < M; m += kRows) {
      const T value = relu_gradient(grad_output[m * N + column], output[m * N + column]);
      masked[m * N + column] = value;
      sum += load(value);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < N) {
    A total = 0;
    for (int i = 0; i < kRows; ++i) total += sums[i][lane];
    grad_bias[column] = store<T>(total);
  }
}

Tensor linear_relu_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  check_linear("linear_relu", x, weight, bias);
  std::array<StableIValue, 1> stack{from(aten_linear(x, weight, bias))};
  return call_aten("aten::relu_", "", stack.data());
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward_cuda(const Tensor& grad_output,
                                                             const Tensor& output, const Tensor& x,
                                                             const Tensor& weight, bool want_input,
                                                             bool want_weight, bool want_bias) {
  check_linear_relu_backward(grad_output, output, x, weight);
  const Tensor grad = torch::stable::contiguous(rows_of(grad_output));
  const Tensor stored = torch::stable::contiguous(rows_of(output));
  const int64_t M = grad.size(0), N = grad.size(1);
  const Tensor masked = torch::stable::new_empty(grad, {M, N});
  const Tensor grad_bias = torch::stable::new_zeros(grad, {N});
  if (masked.numel() > 0) {
    const DeviceGuard guard(masked.get_device_index());
    SKINFAST_CUDA_DISPATCH(dtype_of(masked), T, {
      launch(&mask_and_sum_columns_kernel<T>,
             dim3(static_cast<unsigned>((N + kWarpSize - 1) / kWarpSize)), kThreads, 0,
             current_stream(masked), M, N, static_cast<const T*>(grad.const_data_ptr()),
             static_cast<const T*>(stored.const_data_ptr()),
             static_cast<T*>(masked.mutable_data_ptr()),
             static_cast<T*>(grad_bias.mutable_data_ptr()));
    });
  }
  const auto [grad_x, grad_weight] =
      aten_linear_gradients(masked, x, weight, want_input, want_weight);
  return {grad_x, grad_weight, want_bias ? grad_bias : no_tensor(x)};
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("linear_relu", TORCH_BOX(&linear_relu_cuda));
  m.impl("linear_relu_backward", TORCH_BOX(&linear_relu_backward_cuda));
}

}  // namespace skinfast
