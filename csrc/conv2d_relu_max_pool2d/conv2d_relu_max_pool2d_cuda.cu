#include "conv2d_relu_max_pool2d/conv2d_relu_max_pool2d.h"

#include "conv2d_relu/conv2d_relu_cuda.h"
#include "max_pool2d/max_pool2d.h"

namespace skinfast {
namespace {

// The maximum of each window of a tile is all that is stored, and where it was.
template <typename T>
struct PooledResult {
  using A = accumulate_t<T>;
  Strided<T> output;
  Strided<uint8_t> argmax;
  int height, width;  // of a window: at most kTile

  // A tile is so many whole windows. Divisions are of 32 bits: those of 64 are calls on the device.
  __host__ __device__ int rows() const { return kTile / height; }
  __host__ __device__ int columns() const { return kTile / width; }
  __host__ __device__ int tile_rows() const { return rows() * height; }
  __host__ __device__ int tile_columns() const { return columns() * width; }
  __host__ __device__ int tiles_p(const SmallConv2d& conv) const {
    return (static_cast<int>(conv.P) / height + rows() - 1) / rows();
  }
  __host__ __device__ int tiles_q(const SmallConv2d& conv) const {
    return (static_cast<int>(conv.Q) / width + columns() - 1) / columns();
  }

  // As StoredResult's. Values are rounded as if they had been stored.
  __device__ __forceinline__ void store_sums(const SmallConv2d& conv, const A* sum, int n,
                                             int first, int p, int q) const {
    constexpr int kFilters = static_cast<int>(kFilterBlock);
    __shared__ A values[kFilters * kTile * kTile];
#pragma unroll
    for (int k = 0; k < kFilters; ++k) {
      values[k * kTile * kTile + threadIdx.x] = load(store<T>(relu(sum[k])));
    }
    __syncthreads();
    const int windows = rows() * columns();
    const int output_rows = static_cast<int>(conv.P) / height;
    const int output_columns = static_cast<int>(conv.Q) / width;
    for (int i = threadIdx.x; i < kFilters * windows; i += kThreads) {
      const int k = i / windows, r = i % windows / columns(), c = i % columns();
      const int oh = p / height + r, ow = q / width + c;
      if (first + k >= conv.K || oh >= output_rows || ow >= output_columns) continue;
      const A* own = values + (k * kTile + r * height) * kTile + c * width;
      A maximum = minus_infinity<A>();
      int position = 0;
      for (int h = 0; h < height; ++h) {
        for (int w = 0; w < width; ++w) {
          take_maximum(own[h * kTile + w], h * width + w, maximum, position);
        }
      }
      output.at(n, first + k, oh, ow) = store<T>(maximum);
      argmax.at(n, first + k, oh, ow) = static_cast<uint8_t>(position);
    }
  }
};

// The gradient of the convolution's output before its ReLU, from that of the pooled one.
template <typename T>
struct UnpooledPixels {
  using A = accumulate_t<T>;
  Strided<const T> grad_output, output;
  Strided<const uint8_t> argmax;
  int height, width;  // of a window
  int rows, columns;  // of the pooled output

  __device__ __forceinline__ A value(int n, int c, int h, int w) const {
    const int oh = h / height, ow = w / width;
    const int position = (h - oh * height) * width + (w - ow * width);
    if (oh >= rows || ow >= columns || argmax.at(n, c, oh, ow) != position) return A(0);
    return load(relu_gradient(grad_output.at(n, c, oh, ow), output.at(n, c, oh, ow)));
  }
};

std::tuple<Tensor, Tensor> conv2d_relu_max_pool2d_cuda(const Tensor& x, const Tensor& weight,
                                                       const std::optional<Tensor>& bias,
                                                       const std::vector<int64_t>& padding,
                                                       const std::vector<int64_t>& pool_size) {
  const PooledConv2dCall call =
      check_conv2d_relu_max_pool2d("conv2d_relu_max_pool2d", x, weight, bias, padding, pool_size);
  const auto [height, width] = call.window;
  if (!is_small_conv2d(x, weight, call.arguments) || x.size(0) == 0 ||
      std::max(height, width) > kTile) {
    return composed_conv2d_relu_max_pool2d(x, weight, bias, call);
  }
  const MemoryFormat layout = conv2d_layout(x, weight);
  Tensor output = empty_in(x, call.shape, layout);
  Tensor argmax = empty_in(x, call.shape, layout, ScalarType::Byte);
  const DeviceGuard guard(x.get_device_index());
  const SmallConv2d conv = small_conv2d_of(x, weight, call.convolved, call.arguments);
  const Tensor dense_weight = dense(weight, MemoryFormat::Contiguous);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  const int window_height = static_cast<int>(height), window_width = static_cast<int>(width);
  SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
    const PooledResult<T> result{strided<T>(output), strided<uint8_t>(argmax), window_height,
                                 window_width};
    launch_convolution<T>(conv, stored_pixels<T>(x), dense_weight, false, dense_bias, result);
  });
  return {output, argmax};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_max_pool2d_backward_cuda(
    const Tensor& grad_output, const Tensor& output, const Tensor& argmax, const Tensor& x,
    const Tensor& weight, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& pool_size, bool want_input, bool want_weight, bool want_bias) {
  constexpr const char* op = "conv2d_relu_max_pool2d_backward";
  const PooledConv2dCall call =
      check_conv2d_relu_max_pool2d(op, x, weight, std::nullopt, padding, pool_size);
  check_pooled_gradient(op, grad_output, output, argmax, x, call);
  const std::array<bool, 3> wanted{want_input, want_weight, want_bias};
  if (!is_small_conv2d(x, weight, call.arguments) || x.size(0) == 0) {
    return aten_conv2d_backward(
        unpooled_gradient(grad_output, output, argmax, call, conv2d_layout(x, weight)), x, weight,
        call.arguments, wanted);
  }
  const DeviceGuard guard(x.get_device_index());
  const SmallConv2d conv = small_conv2d_of(x, weight, call.convolved, call.arguments);
  std::tuple<Tensor, Tensor, Tensor> gradients{no_tensor(x), no_tensor(x), no_tensor(x)};
  SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
    const UnpooledPixels<T> masked{.grad_output = strided_const<T>(grad_output),
                                   .output = strided_const<T>(output),
                                   .argmax = strided_const<uint8_t>(argmax),
                                   .height = static_cast<int>(call.window.height),
                                   .width = static_cast<int>(call.window.width),
                                   .rows = static_cast<int>(call.shape[2]),
                                   .columns = static_cast<int>(call.shape[3])};
    gradients = small_conv2d_gradients<T>(conv, masked, x, weight, wanted);
  });
  return gradients;
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv2d_relu_max_pool2d", TORCH_BOX(&conv2d_relu_max_pool2d_cuda));
  m.impl("conv2d_relu_max_pool2d_backward", TORCH_BOX(&conv2d_relu_max_pool2d_backward_cuda));
}

}  // namespace skinfast
