#include <limits>

#include "core/cuda.h"
#include "global_average_pool2d/global_average_pool2d.h"

namespace skinfast {
namespace {

// How a sum is cut depends on the number of pixels alone, never on the batch or on where in memory
// an image lies.

// --- channels_last: threads [y, x] of a block, x along the means, y along an image's pixels
// -------

// So many pixels for each of two threads, before they share an image's.
constexpr int64_t kPixelsPerThread = 8;

inline dim3 block_of_channels(int64_t pixels) {
  unsigned y = 1;
  while (y < kWarpSize && pixels >= 2 * y * kPixelsPerThread) y *= 2;
  return dim3(kThreads / y, y);
}

// A thread adds every blockDim.y-th pixel in kWidth channels of an image.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    average_channels_kernel(const T* __restrict__ x, T* __restrict__ output,
                            GlobalAveragePool2dParams p) {
  using A = accumulate_t<T>;
  using V = Vector<T, kWidth>;
  __shared__ A shared[kThreads * kWidth];
  A* own = shared + (threadIdx.y * blockDim.x + threadIdx.x) * kWidth;
  const int64_t count = p.batch * p.channels / kWidth;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x; first < count;
       first += stride) {
    const int64_t i = first + threadIdx.x;
    const int64_t n = i * kWidth / p.channels;
    const T* image = x + n * (p.pixels - 1) * p.channels + i * kWidth;
    A sums[kWidth] = {};
#pragma unroll 4
    for (int64_t k = i < count ? threadIdx.y : p.pixels; k < p.pixels; k += blockDim.y) {
      const V in = *reinterpret_cast<const V*>(image + k * p.channels);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) sums[v] += load(in.values[v]);
    }
    if (blockDim.y > 1) {
      __syncthreads();  // the sums of the turn before have been read
#pragma unroll
      for (int v = 0; v < kWidth; ++v) own[v] = sums[v];
      for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y >= half) continue;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) own[v] += own[half * blockDim.x * kWidth + v];
      }
#pragma unroll
      for (int v = 0; v < kWidth; ++v) sums[v] = own[v];
    }
    if (threadIdx.y != 0 || i >= count) continue;
    V out;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      out.values[v] = store<T>(share_of(sums[v], static_cast<A>(p.pixels)));
    }
    reinterpret_cast<V*>(output)[i] = out;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    spread_channels_kernel(const T* __restrict__ grad_output, T* __restrict__ grad,
                           GlobalAveragePool2dParams p) {
  using A = accumulate_t<T>;
  using V = Vector<T, kWidth>;
  const int64_t count = p.batch * p.channels / kWidth;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    V share = reinterpret_cast<const V*>(grad_output)[i];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      share.values[v] = store<T>(share_of(load(share.values[v]), static_cast<A>(p.pixels)));
    }
    T* image = grad + i * kWidth / p.channels * (p.pixels - 1) * p.channels + i * kWidth;
    for (int64_t k = threadIdx.y; k < p.pixels; k += blockDim.y) {
      *reinterpret_cast<V*>(image + k * p.channels) = share;
    }
  }
}

// --- contiguous: maps of p.pixels neighbours
// ------------------------------------------------------

// What a block may have without asking for more.
constexpr int64_t kSharedBytes = 48 * 1024;

// A thread a map. A map may begin where no access of 16 bytes can, but kThreads of them together
// never do; so a block copies theirs, then adds.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    average_tiles_kernel(const T* __restrict__ x, T* __restrict__ output, int pixels,
                         int64_t maps) {
  using A = accumulate_t<T>;
  using V = Vector<T, kVectorWidth<T>>;
  SKINFAST_DYNAMIC_SHARED(T, tile);  // [kThreads, pixels]
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < maps;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int present = static_cast<int>(min(maps - first, static_cast<int64_t>(kThreads)));
    const int elements = present * pixels;
    const int vectors = elements / kVectorWidth<T>;
    const T* source = x + first * pixels;
    __syncthreads();  // the tile before has been added
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      reinterpret_cast<V*>(tile)[i] = reinterpret_cast<const V*>(source)[i];
    }
    for (int i = vectors * kVectorWidth<T> + threadIdx.x; i < elements; i += kThreads) {
      tile[i] = source[i];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= present) continue;
    const T* map = tile + threadIdx.x * pixels;
    A sum = A(0);
    for (int k = 0; k < pixels; ++k) sum += load(map[k]);
    output[first + threadIdx.x] = store<T>(share_of(sum, static_cast<A>(pixels)));
  }
}

// blockDim.x neighbouring threads of one warp a map, kWidth elements an access. All lanes of a warp
// take equally many turns, so that its shuffles never lack one.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    average_maps_kernel(const T* __restrict__ x, T* __restrict__ output, int64_t pixels,
                        int64_t maps) {
  using A = accumulate_t<T>;
  using V = Vector<T, kWidth>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < maps;
       first += stride) {
    const int64_t map = first + threadIdx.y;
    const V* source = reinterpret_cast<const V*>(x + map * pixels);
    A sum = A(0);
#pragma unroll 4
    for (int64_t i = map < maps ? threadIdx.x : pixels; i < pixels / kWidth; i += blockDim.x) {
      const V in = source[i];
#pragma unroll
      for (int v = 0; v < kWidth; ++v) sum += load(in.values[v]);
    }
    for (int distance = blockDim.x / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (threadIdx.x == 0 && map < maps) {
      output[map] = store<T>(share_of(sum, static_cast<A>(pixels)));
    }
  }
}

// 16 bytes of the gradient a turn, which may be of several maps. Index is 32 bits wide where the
// count allows: the division is most of the work.
template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    spread_maps_kernel(const T* __restrict__ grad_output, T* __restrict__ grad, Index pixels,
                       Index count) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i * kWidth < count;
       i += stride) {
    const Index first = static_cast<Index>(i * kWidth);
    const int present = count - first < kWidth ? static_cast<int>(count - first) : kWidth;
    Index map = first / pixels;
    Index left = pixels - first % pixels;  // in the map
    Vector<T, kWidth> out;
    T share = store<T>(share_of(load(grad_output[map]), static_cast<A>(pixels)));
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      if (left == 0 && v < present) {
        share = store<T>(share_of(load(grad_output[++map]), static_cast<A>(pixels)));
        left = pixels;
      }
      --left;
      out.values[v] = share;
    }
    if (present == kWidth) {
      *reinterpret_cast<Vector<T, kWidth>*>(grad + first) = out;
    } else {
      for (int v = 0; v < present; ++v) grad[first + v] = out.values[v];
    }
  }
}

// --- host
// -----------------------------------------------------------------------------------------

template <typename T>
void average_contiguous(const T* x, T* output, const GlobalAveragePool2dParams& p,
                        cudaStream_t stream) {
  const int64_t maps = p.batch * p.channels;
  const int64_t tile = kThreads * p.pixels * static_cast<int64_t>(sizeof(T));
  if (is_aligned(x) && tile <= kSharedBytes) {
    launch(&average_tiles_kernel<T>, grid_for(maps), kThreads, static_cast<size_t>(tile), stream, x,
           output, static_cast<int>(p.pixels), maps);
    return;
  }
  const bool wide = is_aligned(x) && p.pixels % kVectorWidth<T> == 0;
  const int64_t accesses = p.pixels / (wide ? kVectorWidth<T> : 1);
  unsigned lanes = 1;
  while (lanes < kWarpSize && 2 * lanes <= accesses) lanes *= 2;
  const dim3 block(lanes, kThreads / lanes);
  launch(wide ? &average_maps_kernel<T, kVectorWidth<T>> : &average_maps_kernel<T, 1>,
         grid_for(maps, static_cast<int>(block.y)), block, 0, stream, x, output, p.pixels, maps);
}

Tensor global_average_pool2d_cuda(const Tensor& x) {
  return global_average_pool2d_host(x, [](const Tensor& x, const Tensor& output,
                                          const GlobalAveragePool2dParams& params) {
    const DeviceGuard guard(x.get_device_index());
    SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
      const T* in = static_cast<const T*>(x.const_data_ptr());
      T* out = static_cast<T*>(output.mutable_data_ptr());
      if (!params.channels_last) {
        average_contiguous(in, out, params, current_stream(x));
      } else {
        const bool wide = is_aligned(in) && params.channels % kVectorWidth<T> == 0;
        const dim3 block = block_of_channels(params.pixels);
        const int64_t count = output.numel() / (wide ? kVectorWidth<T> : 1);
        launch(wide ? &average_channels_kernel<T, kVectorWidth<T>> : &average_channels_kernel<T, 1>,
               grid_for(count, static_cast<int>(block.x)), block, 0, current_stream(x), in, out,
               params);
      }
    });
  });
}

Tensor global_average_pool2d_backward_cuda(const Tensor& grad_output,
                                           const std::vector<int64_t>& input_size,
                                           bool channels_last) {
  return global_average_pool2d_backward_host(
      grad_output, input_size, channels_last,
      [](const Tensor& grad_output, const Tensor& grad, const GlobalAveragePool2dParams& params) {
        const DeviceGuard guard(grad.get_device_index());
        const cudaStream_t stream = current_stream(grad);
        const int64_t count = grad.numel();
        SKINFAST_CUDA_DISPATCH(dtype_of(grad), T, {
          const T* in = static_cast<const T*>(grad_output.const_data_ptr());
          T* out = static_cast<T*>(grad.mutable_data_ptr());
          const dim3 grid = grid_for((count + kVectorWidth<T> - 1) / kVectorWidth<T>);
          if (params.channels_last) {
            const bool wide = is_aligned(in) && params.channels % kVectorWidth<T> == 0;
            const dim3 block = block_of_channels(params.pixels);
            const int64_t means = grad_output.numel() / (wide ? kVectorWidth<T> : 1);
            launch(
                wide ? &spread_channels_kernel<T, kVectorWidth<T>> : &spread_channels_kernel<T, 1>,
                grid_for(means, static_cast<int>(block.x)), block, 0, stream, in, out, params);
          } else if (count <= std::numeric_limits<uint32_t>::max()) {
            launch(&spread_maps_kernel<T, uint32_t>, grid, kThreads, 0, stream, in, out,
                   params.pixels, count);
          } else {
            launch(&spread_maps_kernel<T, int64_t>, grid, kThreads, 0, stream, in, out,
                   params.pixels, count);
          }
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("global_average_pool2d", TORCH_BOX(&global_average_pool2d_cuda));
  m.impl("global_average_pool2d_backward", TORCH_BOX(&global_average_pool2d_backward_cuda));
}

}  // namespace skinfast
