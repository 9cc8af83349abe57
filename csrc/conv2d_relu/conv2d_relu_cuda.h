// Small convolutions on CUDA, for conv2d_relu and conv2d_relu_max_pool2d.
//
// Floors of the CNN's three layers at batch 256, on an H100 of 67 TFLOP/s in float32 and 3 TB/s:
// 8.5, 20 and 3.7 us of multiply-adds for a forward pass; 8.6, 3.9 and 0.4 us of memory where the
// output is pooled before it is stored, 28, 7.0 and 0.7 us more where it is stored and read again.
// So arithmetic decides, and what feeds it: shared memory. Forward, a thread reads a tap of ten
// filters in three accesses for ten multiply-adds; for the weights' gradient, a pixel and a
// gradient for S of them.
#pragma once

#include <limits>

#include "conv2d_relu/conv2d_relu.h"
#include "core/cuda.h"

namespace skinfast {

// A block computes a tile of kTile x kTile output pixels of one image, a thread one pixel.
constexpr int kTile = 16;
constexpr int kSmall = static_cast<int>(kSmallKernel);
constexpr int kHalo = kTile + kSmall - 1;
// Channels are this far apart in shared memory: reads of 16 bytes by threads of different channels
// meet no bank twice.
constexpr int kGradientStride = kTile * kTile + 4;
// Blocks that the weight gradient's work is cut into, where there is that much: some for each of
// 132 multiprocessors. A constant, so that the order of summation depends on nothing but the shape.
constexpr int kWeightBlocks = 132 * 4;

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

// What a convolution reads: value(n, c, h, w) of a stored tensor, or of one that is not stored.
template <typename T>
struct StoredPixels {
  using A = accumulate_t<T>;
  Strided<const T> x;

  __device__ __forceinline__ A value(int n, int c, int h, int w) const {
    return load(x.at(n, c, h, w));
  }
};

template <typename T>
StoredPixels<T> stored_pixels(const Tensor& x) {
  return {strided_const<T>(x)};
}

// Where a convolution's sums go: a tile's pixels each.
template <typename T>
struct StoredResult {
  using A = accumulate_t<T>;
  Strided<T> output;
  bool with_relu;

  // Pixels from one tile to the next, and the tiles of a map.
  __host__ __device__ int tile_rows() const { return kTile; }
  __host__ __device__ int tile_columns() const { return kTile; }
  __host__ __device__ int tiles_p(const SmallConv2d& conv) const {
    return static_cast<int>(ceil_div(conv.P, kTile));
  }
  __host__ __device__ int tiles_q(const SmallConv2d& conv) const {
    return static_cast<int>(ceil_div(conv.Q, kTile));
  }

  // sum [kFilterBlock]: of the filters from `first` on, at this thread's pixel of the tile (p, q).
  __device__ __forceinline__ void store_sums(const SmallConv2d& conv, const A* sum, int n,
                                             int first, int p, int q) const {
    const int row = p + threadIdx.x / kTile, column = q + threadIdx.x % kTile;
    if (row >= conv.P || column >= conv.Q) return;
#pragma unroll
    for (int k = 0; k < kFilterBlock; ++k) {
      if (first + k < conv.K) {
        output.at(n, first + k, row, column) = store<T>(with_relu ? relu(sum[k]) : sum[k]);
      }
    }
  }
};

// tile[i][j] = x[n, c, top + i, left + j] for the halo of one output tile, zero outside.
template <typename Pixels>
__device__ __forceinline__ void load_halo(const SmallConv2d& conv, const Pixels& x, int n, int c,
                                          int top, int left, typename Pixels::A* tile) {
  for (int i = threadIdx.x; i < kHalo * kHalo; i += kThreads) {
    const int h = top + i / kHalo, w = left + i % kHalo;
    const bool inside = h >= 0 && h < conv.H && w >= 0 && w < conv.W;
    tile[i] = inside ? x.value(n, c, h, w) : typename Pixels::A(0);
  }
}

// output = conv(x) (+ bias), as Result stores it. With `turned`, weight is [C, K, R, S] and turned
// by 180 degrees: the convolution that gives the gradient of the input.
template <typename T, typename Pixels, typename Result>
__global__ void __launch_bounds__(kThreads, 2)
    small_conv2d_kernel(SmallConv2d conv, Pixels x, const T* weight, bool turned, const T* bias,
                        Result result, int items) {
  using A = accumulate_t<T>;
  constexpr int kFilters = static_cast<int>(kFilterBlock);
  __shared__ A tile[kHalo * kHalo];
  constexpr int kWide = kVectorWidth<A>;
  constexpr int kTapStride = (kFilters + kWide - 1) / kWide * kWide;
  __shared__ __align__(16) A taps[kSmall * kSmall * kTapStride];

  // 32-bit: a 64-bit division is a call on the device, and makes the sums spill around it.
  const int tiles_q = result.tiles_q(conv), tiles = result.tiles_p(conv) * tiles_q;
  const int blocks = static_cast<int>(ceil_div(conv.K, kFilters));
  const int RS = static_cast<int>(conv.R * conv.S);
  const int row = threadIdx.x / kTile, column = threadIdx.x % kTile;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int n = item / tiles / blocks, first = item / tiles % blocks * kFilters;
    const int p = item % tiles / tiles_q * result.tile_rows();
    const int q = item % tiles_q * result.tile_columns();
    A sum[kFilters];
#pragma unroll
    for (int k = 0; k < kFilters; ++k)
      sum[k] = bias && first + k < conv.K ? A(load(bias[first + k])) : A(0);
    for (int c = 0; c < conv.C; ++c) {
      load_halo(conv, x, n, c, p - static_cast<int>(conv.pad_h), q - static_cast<int>(conv.pad_w),
                tile);
      for (int i = threadIdx.x; i < RS * kFilters; i += kThreads) {
        const int k = first + i % kFilters, tap = i / kFilters;
        const int64_t from =
            turned ? (c * conv.K + k) * RS + RS - 1 - tap : (k * conv.C + c) * RS + tap;
        taps[tap * kTapStride + i % kFilters] = k < conv.K ? A(load(weight[from])) : A(0);
      }
      __syncthreads();
      // Not unrolled: the ten sums are parallelism enough, and unrolled taps spill.
#pragma unroll 1
      for (int r = 0; r < conv.R; ++r) {
#pragma unroll 1
        for (int s = 0; s < conv.S; ++s) {
          const A value = tile[(row + r) * kHalo + column + s];
          const A* tap = taps + (r * conv.S + s) * kTapStride;
#pragma unroll
          for (int i = 0; i < kFilters; i += kWide) {
            const auto wide = *reinterpret_cast<const Vector<A, kWide>*>(tap + i);
#pragma unroll
            for (int k = 0; k < kWide && i + k < kFilters; ++k)
              sum[i + k] += wide.values[k] * value;
          }
        }
      }
      __syncthreads();
    }
    result.store_sums(conv, sum, n, first, p, q);
  }
}

// How the products of all output tiles are shared by blocks: every `chunk` of so many consecutive
// tiles, counted through all images, leaves a partial gradient.
struct WeightChunks {
  int tiles_q, tiles_per_image;
  int tiles, tiles_per_chunk, chunks;
};

inline WeightChunks weight_chunks(const SmallConv2d& conv) {
  const int64_t tiles_q = ceil_div(conv.Q, kTile);
  const int64_t per_image = ceil_div(conv.P, kTile) * tiles_q;
  const int64_t tiles = conv.N * per_image;
  const int64_t wanted = std::clamp<int64_t>(kWeightBlocks / conv.C, 1, tiles);
  const int64_t per_chunk = ceil_div(tiles, wanted);
  SKINFAST_CHECK(tiles < std::numeric_limits<int>::max() / kTile, "conv2d_relu: an output of ",
                 conv.N, " x ", conv.P, " x ", conv.Q,
                 " is too large for one launch, split the batch");
  return {static_cast<int>(tiles_q), static_cast<int>(per_image), static_cast<int>(tiles),
          static_cast<int>(per_chunk), static_cast<int>(ceil_div(tiles, per_chunk))};
}

// One block: the partial gradients of all filters' weights for input channel c over one chunk, and
// those of the biases where c is 0. partial [chunks, K*C*R*S + K]. A thread has the taps of one row
// r of one filter k, up to kTaps of them, in registers: per output pixel it reads the gradient and
// one new input pixel from shared memory, for S multiply-adds. Groups of threads take every
// groups-th row of a tile, and are added up in their order at the end.
template <typename T, typename Gradient, int kTaps>
__global__ void __launch_bounds__(kThreads, 2)
    small_conv2d_weight_kernel(SmallConv2d conv, WeightChunks chunks, StoredPixels<T> x,
                               Gradient masked, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  constexpr int kSums = kTaps + 1;  // and the bias
  constexpr int kWide = kVectorWidth<A>;
  __shared__ A tile[kHalo * kHalo];
  __shared__ __align__(16) A gradient[kSmallChannels * kGradientStride];
  static_assert(kThreads * kSums <= kSmallChannels * kGradientStride);

  const int C = static_cast<int>(conv.C), K = static_cast<int>(conv.K);
  const int R = static_cast<int>(conv.R), S = static_cast<int>(conv.S);
  const int c = blockIdx.x % C, chunk = blockIdx.x / C;
  const int rows = K * R;  // of weights
  const int groups = kThreads / rows < kTile ? kThreads / rows : kTile;
  const int own = threadIdx.x % rows, group = threadIdx.x / rows;
  const int k = own / R, r = own % R;

  A sum[kSums] = {};
  const int begin = chunk * chunks.tiles_per_chunk;
  const int end =
      begin + chunks.tiles_per_chunk < chunks.tiles ? begin + chunks.tiles_per_chunk : chunks.tiles;
  for (int item = begin; item < end; ++item) {
    const int n = item / chunks.tiles_per_image, within = item % chunks.tiles_per_image;
    const int p = within / chunks.tiles_q * kTile, q = within % chunks.tiles_q * kTile;
    load_halo(conv, x, n, c, p - static_cast<int>(conv.pad_h), q - static_cast<int>(conv.pad_w),
              tile);
    for (int i = threadIdx.x; i < K * kTile * kTile; i += kThreads) {
      const int channel = i / (kTile * kTile), pixel = i % (kTile * kTile);
      const int row = p + pixel / kTile, column = q + pixel % kTile;
      const bool inside = row < conv.P && column < conv.Q;
      gradient[channel * kGradientStride + pixel] =
          inside ? masked.value(n, channel, row, column) : A(0);
    }
    __syncthreads();
    for (int row = group; group < groups && row < kTile; row += groups) {
      const A* values = tile + (row + r) * kHalo;
      const A* grads = gradient + k * kGradientStride + row * kTile;
      A window[kTaps];
      A row_sum[kSums] = {};  // first by rows: long sums of floats lose digits
#pragma unroll
      for (int s = 0; s < kTaps - 1; ++s) window[s + 1] = values[s];
#pragma unroll
      for (int column = 0; column < kTile; column += kWide) {
        const auto g = *reinterpret_cast<const Vector<A, kWide>*>(grads + column);
#pragma unroll
        for (int v = 0; v < kWide; ++v) {
#pragma unroll
          for (int s = 0; s < kTaps - 1; ++s) window[s] = window[s + 1];
          window[kTaps - 1] = values[column + v + kTaps - 1];
#pragma unroll
          for (int s = 0; s < kTaps; ++s) row_sum[s] += g.values[v] * window[s];
          row_sum[kTaps] += g.values[v];
        }
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) sum[s] += row_sum[s];
    }
    __syncthreads();
  }

  // The groups' sums, where the gradient was: [groups, rows, kSums].
  if (group < groups) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) gradient[threadIdx.x * kSums + s] = sum[s];
  }
  __syncthreads();
  const int weights = rows * S;
  A* mine = partial + static_cast<int64_t>(chunk) * (C * weights + K);
  for (int i = threadIdx.x; i < weights + (c == 0 ? K : 0); i += kThreads) {
    const bool is_bias = i >= weights;
    const int row = is_bias ? (i - weights) * R : i / S;
    const int at = row * kSums + (is_bias ? kTaps : i % S);
    A total = 0;
    for (int g = 0; g < groups; ++g) total += gradient[g * rows * kSums + at];
    const int filter = row / R, from = row % R * S + i % S;
    mine[is_bias ? C * weights + filter : (filter * C + c) * R * S + from] = total;
  }
}

// result[i] = the partial sums of all chunks, for the weights and, behind them, the biases. A
// block's rows of threads each add every kSumRows-th chunk, and are added up in order.
constexpr int kSumRows = kThreads / kWarpSize;

template <typename T>
__global__ void sum_partials_kernel(const accumulate_t<T>* partial, int chunks, int weights,
                                    int size, T* grad_weight, T* grad_bias) {
  using A = accumulate_t<T>;
  __shared__ A shared[kSumRows][kWarpSize];
  const int i = blockIdx.x * kWarpSize + threadIdx.x;
  A sum = 0;
#pragma unroll 4
  for (int chunk = threadIdx.y; chunk < chunks; chunk += kSumRows) {
    if (i < size) sum += partial[static_cast<int64_t>(chunk) * size + i];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= size) return;
  for (int row = 1; row < kSumRows; ++row) sum += shared[row][threadIdx.x];
  (i < weights ? grad_weight[i] : grad_bias[i - weights]) = store<T>(sum);
}

template <typename T, typename Pixels, typename Result>
void launch_convolution(const SmallConv2d& conv, const Pixels& x, const Tensor& weight, bool turned,
                        const std::optional<Tensor>& bias, const Result& result) {
  const int64_t items = conv.N * ceil_div(conv.K, kFilterBlock) *
                        static_cast<int64_t>(result.tiles_p(conv)) * result.tiles_q(conv);
  SKINFAST_CHECK(items < std::numeric_limits<int>::max() / 2, "conv2d_relu: input has shape [",
                 conv.N, ", ", conv.C, ", ", conv.H, ", ", conv.W,
                 "]; that is too large for one launch, split the batch");
  const T* bias_data = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  launch(&small_conv2d_kernel<T, Pixels, Result>, grid_for(items, 1), kThreads, 0,
         current_stream(weight), conv, x, static_cast<const T*>(weight.const_data_ptr()), turned,
         bias_data, result, static_cast<int>(items));
}

// The gradients of input, weight and bias that are wanted; `masked` is the gradient of the output
// before its ReLU.
template <typename T, typename Gradient>
std::tuple<Tensor, Tensor, Tensor> small_conv2d_gradients(const SmallConv2d& conv,
                                                          const Gradient& masked, const Tensor& x,
                                                          const Tensor& weight,
                                                          const std::array<bool, 3>& wanted) {
  const auto [want_input, want_weight, want_bias] = wanted;
  Tensor grad_x = no_tensor(x), grad_weight = no_tensor(x), grad_bias = no_tensor(x);
  if (want_input) {
    grad_x = empty_in(x, shape_of(x), conv2d_layout(x, weight));
    const Tensor dense_weight = dense(weight, MemoryFormat::Contiguous);
    launch_convolution<T>(conv.of_input_gradient(), masked, dense_weight, true, std::nullopt,
                          StoredResult<T>{strided<T>(grad_x), false});
  }
  if (want_weight || want_bias) {
    const WeightChunks chunks = weight_chunks(conv);
    const int weights = static_cast<int>(weight.numel()), size = weights + static_cast<int>(conv.K);
    const Tensor partial = torch::stable::new_empty(x, {chunks.chunks, size}, accumulate_dtype(x));
    Tensor summed = torch::stable::new_empty(weight, shape_of(weight));
    grad_bias = torch::stable::new_empty(x, {conv.K});
    const cudaStream_t stream = current_stream(x);
    auto* sums = static_cast<accumulate_t<T>*>(partial.mutable_data_ptr());
    const auto kernel = conv.S <= 3   ? &small_conv2d_weight_kernel<T, Gradient, 3>
                        : conv.S <= 5 ? &small_conv2d_weight_kernel<T, Gradient, 5>
                                      : &small_conv2d_weight_kernel<T, Gradient, kSmall>;
    launch(kernel, dim3(static_cast<unsigned>(chunks.chunks * conv.C)), kThreads, 0, stream, conv,
           chunks, stored_pixels<T>(x), masked, sums);
    launch(&sum_partials_kernel<T>, dim3(static_cast<unsigned>(ceil_div(size, kWarpSize))),
           dim3(kWarpSize, kSumRows), 0, stream, sums, chunks.chunks, weights, size,
           static_cast<T*>(summed.mutable_data_ptr()),
           static_cast<T*>(grad_bias.mutable_data_ptr()));
    grad_weight = dense(summed, layout_of(weight));
  }
  return {grad_x, want_weight ? grad_weight : no_tensor(x), want_bias ? grad_bias : no_tensor(x)};
}

}  // namespace skinfast
