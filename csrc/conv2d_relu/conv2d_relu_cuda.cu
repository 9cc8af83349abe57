#include "conv2d_relu/conv2d_relu_cuda.h"

#include "conv2d/conv2d_cuda.h"
#include "core/cuda.h"

#include <limits>

namespace skinfast {
namespace {

// A block computes a tile of kTile x kTile output pixels of one image, a thread one pixel.
constexpr int kTile = 16;
constexpr int kSmall = static_cast<int>(kSmallKernel);
constexpr int kHalo = kTile + kSmall - 1;
// Images whose products one partial weight gradient adds up: fixed, so that the order of summation
// depends on nothing but the shape.
constexpr int64_t kImagesPerPartial = 4;
constexpr int kWeightsPerThread =
    (kSmallChannels * (kSmall * kSmall + 1) + kThreads - 1) / kThreads;

// A tensor [N, C, H, W] by its strides, in any layout.
template <typename T>
struct Strided {
  T* data;
  int64_t n, c, h, w;

  __device__ __forceinline__ T& at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    return data[in * n + ic * c + ih * h + iw * w];
  }
};

template <typename T>
Strided<const T> strided_const(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2),
          x.stride(3)};
}
template <typename T>
Strided<T> strided(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2),
          x.stride(3)};
}

// tile[i][j] = x[n, c, top + i, left + j] for the halo of one output tile, zero outside.
template <typename T>
__device__ __forceinline__ void load_halo(const SmallConv2d& conv, Strided<const T> x, int64_t n,
                                          int64_t c, int64_t top, int64_t left,
                                          accumulate_t<T>* tile) {
  for (int i = threadIdx.x; i < kHalo * kHalo; i += kThreads) {
    const int64_t h = top + i / kHalo, w = left + i % kHalo;
    const bool inside = h >= 0 && h < conv.H && w >= 0 && w < conv.W;
    tile[i] = inside ? load(x.at(n, c, h, w)) : accumulate_t<T>(0);
  }
}

// output = conv(x) (+ bias) (through ReLU). With `turned`, weight is [C, K, R, S]
// and turned by 180 degrees: the convolution that gives the gradient of the input.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    small_conv2d_kernel(SmallConv2d conv, Strided<const T> x, const T* weight, bool turned,
                        const T* bias, bool with_relu, Strided<T> output, int items) {
  using A = accumulate_t<T>;
  constexpr int kFilters = static_cast<int>(kFilterBlock);
  __shared__ A tile[kHalo * kHalo];
  __shared__ A taps[kSmall * kSmall * kFilters];

  // 32-bit: a 64-bit division is a call on the device, and makes the sums spill around it.
  const int tiles_q = static_cast<int>(ceil_div(conv.Q, kTile));
  const int tiles = static_cast<int>(ceil_div(conv.P, kTile)) * tiles_q;
  const int blocks = static_cast<int>(ceil_div(conv.K, kFilters));
  const int RS = static_cast<int>(conv.R * conv.S);
  const int row = threadIdx.x / kTile, column = threadIdx.x % kTile;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int n = item / tiles / blocks, first = item / tiles % blocks * kFilters;
    const int p = item % tiles / tiles_q * kTile, q = item % tiles_q * kTile;
    A sum[kFilters];
#pragma unroll
    for (int k = 0; k < kFilters; ++k)
      sum[k] = bias && first + k < conv.K ? A(load(bias[first + k])) : A(0);
    for (int64_t c = 0; c < conv.C; ++c) {
      load_halo(conv, x, n, c, p - conv.pad_h, q - conv.pad_w, tile);
      for (int i = threadIdx.x; i < RS * kFilters; i += kThreads) {
        const int k = first + i % kFilters, tap = i / kFilters;
        const int64_t from =
            turned ? (c * conv.K + k) * RS + RS - 1 - tap : (k * conv.C + c) * RS + tap;
        taps[i] = k < conv.K ? A(load(weight[from])) : A(0);
      }
      __syncthreads();
      // Not unrolled: the ten sums are parallelism enough, and unrolled taps spill.
#pragma unroll 1
      for (int r = 0; r < conv.R; ++r) {
#pragma unroll 1
        for (int s = 0; s < conv.S; ++s) {
          const A value = tile[(row + r) * kHalo + column + s];
          const A* tap = taps + (r * conv.S + s) * kFilters;
#pragma unroll
          for (int k = 0; k < kFilters; ++k) sum[k] += tap[k] * value;
        }
      }
      __syncthreads();
    }
    if (p + row < conv.P && q + column < conv.Q) {
#pragma unroll
      for (int k = 0; k < kFilters; ++k) {
        if (first + k < conv.K) {
          output.at(n, first + k, p + row, q + column) =
              store<T>(with_relu ? relu(sum[k]) : sum[k]);
        }
      }
    }
  }
}

// One block: the partial gradients of all filters' weights for input channel c over
// kImagesPerPartial images, and those of the biases where c is 0. partial [chunks, K*C*R*S + K].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    small_conv2d_weight_kernel(SmallConv2d conv, Strided<const T> x, Strided<const T> masked,
                               accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  __shared__ A tile[kHalo * kHalo];
  __shared__ A gradient[kSmallChannels * kTile * kTile];

  const int RS = static_cast<int>(conv.R * conv.S);
  const int64_t c = blockIdx.x % conv.C, chunk = blockIdx.x / conv.C;
  const int K = static_cast<int>(conv.K);
  const int weights = K * RS, total = weights + (c == 0 ? K : 0);
  A sum[kWeightsPerThread] = {};
  const int64_t n_end = chunk * kImagesPerPartial + kImagesPerPartial;
  for (int64_t n = chunk * kImagesPerPartial; n < n_end && n < conv.N; ++n) {
    for (int64_t p = 0; p < conv.P; p += kTile) {
      for (int64_t q = 0; q < conv.Q; q += kTile) {
        load_halo(conv, x, n, c, p - conv.pad_h, q - conv.pad_w, tile);
        for (int i = threadIdx.x; i < K * kTile * kTile; i += kThreads) {
          const int64_t k = i / (kTile * kTile);
          const int64_t row = p + i / kTile % kTile, column = q + i % kTile;
          const bool inside = row < conv.P && column < conv.Q;
          gradient[i] = inside ? A(load(masked.at(n, k, row, column))) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kWeightsPerThread; ++j) {
          const int i = threadIdx.x + j * kThreads;
          if (i >= total) break;
          const bool is_bias = i >= weights;
          const int k = is_bias ? i - weights : i / RS;
          const int r = is_bias ? 0 : i % RS / static_cast<int>(conv.S);
          const int s = is_bias ? 0 : i % static_cast<int>(conv.S);
          A tile_sum = 0;
          for (int row = 0; row < kTile; ++row) {
            for (int column = 0; column < kTile; ++column) {
              const A g = gradient[(k * kTile + row) * kTile + column];
              tile_sum += is_bias ? g : g * tile[(row + r) * kHalo + column + s];
            }
          }
          sum[j] += tile_sum;
        }
        __syncthreads();
      }
    }
  }
  A* mine = partial + chunk * (conv.C * weights + K);
#pragma unroll
  for (int j = 0; j < kWeightsPerThread; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i < weights) {
      mine[(i / RS * conv.C + c) * RS + i % RS] = sum[j];
    } else if (i < total) {
      mine[conv.C * weights + i - weights] = sum[j];
    }
  }
}

// result[i] = the partial sums of all chunks, in order.
template <typename T>
__global__ void sum_partials_kernel(const accumulate_t<T>* partial, int64_t chunks, int64_t size,
                                    int64_t offset, int64_t count, T* result) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    accumulate_t<T> sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * size + offset + i];
    result[i] = store<T>(sum);
  }
}

template <typename T>
void launch_convolution(const SmallConv2d& conv, const Tensor& x, const Tensor& weight, bool turned,
                        const std::optional<Tensor>& bias, bool with_relu, const Tensor& output) {
  const int64_t items =
      conv.N * ceil_div(conv.K, kFilterBlock) * ceil_div(conv.P, kTile) * ceil_div(conv.Q, kTile);
  SKINFAST_CHECK(items < std::numeric_limits<int>::max() / 2, "conv2d_relu: input has shape ",
                 shape_string(x), "; that is too large for one launch, split the batch");
  const T* bias_data = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  launch(&small_conv2d_kernel<T>, grid_for(items, 1), kThreads, 0, current_stream(x), conv,
         strided_const<T>(x), static_cast<const T*>(weight.const_data_ptr()), turned, bias_data,
         with_relu, strided<T>(output), static_cast<int>(items));
}

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
    launch_convolution<T>(conv, x, dense_weight, false, dense_bias, true, output);
  });
  return output;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> small_conv2d_gradients_cuda(const SmallConv2d& conv,
                                                               const Tensor& masked,
                                                               const Tensor& x,
                                                               const Tensor& weight,
                                                               const std::array<bool, 3>& wanted) {
  const DeviceGuard guard(x.get_device_index());
  const auto [want_input, want_weight, want_bias] = wanted;
  Tensor grad_x = no_tensor(x), grad_weight = no_tensor(x), grad_bias = no_tensor(x);
  if (want_input) {
    grad_x = empty_in(x, shape_of(x), conv2d_layout(x, weight));
    const Tensor dense_weight = dense(weight, MemoryFormat::Contiguous);
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      launch_convolution<T>(conv.of_input_gradient(), masked, dense_weight, true, std::nullopt,
                            false, grad_x);
    });
  }
  if (want_weight || want_bias) {
    const int64_t chunks = ceil_div(conv.N, kImagesPerPartial);
    const int64_t size = weight.numel() + conv.K;
    const Tensor partial = torch::stable::new_empty(
        x, {chunks, size},
        x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    Tensor summed = torch::stable::new_empty(weight, shape_of(weight));
    grad_bias = torch::stable::new_empty(x, {conv.K});
    const cudaStream_t stream = current_stream(x);
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      auto* sums = static_cast<accumulate_t<T>*>(partial.mutable_data_ptr());
      launch(&small_conv2d_weight_kernel<T>, dim3(static_cast<unsigned>(chunks * conv.C)), kThreads,
             0, stream, conv, strided_const<T>(x), strided_const<T>(masked), sums);
      launch(&sum_partials_kernel<T>, grid_for(weight.numel()), kThreads, 0, stream, sums, chunks,
             size, int64_t{0}, weight.numel(), static_cast<T*>(summed.mutable_data_ptr()));
      launch(&sum_partials_kernel<T>, grid_for(conv.K), kThreads, 0, stream, sums, chunks, size,
             weight.numel(), conv.K, static_cast<T*>(grad_bias.mutable_data_ptr()));
    });
    grad_weight = dense(summed, layout_of(weight));
  }
  return {grad_x, want_weight ? grad_weight : no_tensor(x), want_bias ? grad_bias : no_tensor(x)};
}

namespace {

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
  return small_conv2d_gradients_cuda(conv, relu_masked(grad_output, output), x, weight,
                                     {want_input, want_weight, want_bias});
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu_cuda));
  m.impl("conv2d_relu_backward", TORCH_BOX(&conv2d_relu_backward_cuda));
}

}  // namespace skinfast
