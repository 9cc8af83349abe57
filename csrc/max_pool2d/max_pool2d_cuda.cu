#include <limits>
#include <type_traits>

#include "core/cuda.h"
#include "max_pool2d/max_pool2d.h"

namespace skinfast {
namespace {

// kWidth neighbouring elements of a tensor [N, C, H, W]: channels of one pixel in channels_last;
// in contiguous layout kWidth is 1.
struct Place {
  int row, column;
  int64_t plane, channel;  // contiguous: plane (n, c), channel 0; channels_last: plane n
};

// Index is 32 bits wide where the count allows: three divisions a thread are most of its work.
template <int kWidth, bool kChannelsLast, typename Index>
__device__ __forceinline__ Place place_of(Index i, int64_t channels, int height, int width) {
  Place place;
  place.channel = 0;
  if (kChannelsLast) {
    const Index groups = static_cast<Index>(channels / kWidth);
    place.channel = static_cast<int64_t>(i % groups) * kWidth;
    i /= groups;
  }
  place.column = static_cast<int>(i % static_cast<Index>(width));
  i /= static_cast<Index>(width);
  place.row = static_cast<int>(i % static_cast<Index>(height));
  place.plane = static_cast<int64_t>(i / static_cast<Index>(height));
  return place;
}

template <typename T, int kWidth, bool kChannelsLast, typename Index>
__global__ void max_pool2d_kernel(const T* __restrict__ x, T* __restrict__ output,
                                  uint8_t* __restrict__ argmax, MaxPool2dParams p, int64_t count) {
  using A = accumulate_t<T>;
  const int64_t step = kChannelsLast ? p.channels : 1;  // from one pixel to the next
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Place place = place_of<kWidth, kChannelsLast>(static_cast<Index>(i), p.channels,
                                                        p.rows.output, p.columns.output);
    const TapRange taps_h = taps_inside(p.rows, place.row);
    const TapRange taps_w = taps_inside(p.columns, place.column);
    A maximum[kWidth];
    int position[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      maximum[v] = minus_infinity<A>();
      position[v] = taps_h.begin * p.columns.kernel + taps_w.begin;
    }
    const T* plane = x + place.plane * p.rows.input * p.columns.input * step + place.channel;
    for (int kh = taps_h.begin; kh < taps_h.end; ++kh) {
      const int h = place.row * p.rows.stride - p.rows.padding + kh * p.rows.dilation;
      for (int kw = taps_w.begin; kw < taps_w.end; ++kw) {
        const int w = place.column * p.columns.stride - p.columns.padding + kw * p.columns.dilation;
        const int64_t pixel = static_cast<int64_t>(h) * p.columns.input + w;
        const auto in = *reinterpret_cast<const Vector<T, kWidth>*>(plane + pixel * step);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          take_maximum(load(in.values[v]), kh * p.columns.kernel + kw, maximum[v], position[v]);
        }
      }
    }
    Vector<T, kWidth> out;
    Vector<uint8_t, kWidth> positions;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      out.values[v] = store<T>(maximum[v]);
      positions.values[v] = static_cast<uint8_t>(position[v]);
    }
    reinterpret_cast<Vector<T, kWidth>*>(output)[i] = out;
    reinterpret_cast<Vector<uint8_t, kWidth>*>(argmax)[i] = positions;
  }
}

// The windows that reach over the input position `i`, taps and the gaps between them alike.
__device__ __forceinline__ TapRange windows_over(const PoolAxis& axis, int i) {
  const int shifted = i + axis.padding;
  const int reach = (axis.kernel - 1) * axis.dilation;
  const int last = shifted / axis.stride;
  if (reach < axis.stride) {  // windows do not overlap: this one or none
    const bool covered = last < axis.output && shifted - last * axis.stride <= reach;
    return {last, covered ? last + 1 : last};
  }
  const int begin = shifted <= reach ? 0 : (shifted - reach + axis.stride - 1) / axis.stride;
  return {begin, last < axis.output ? last + 1 : axis.output};
}

// The tap of window `o` that lies at the input position `i`; -1 where none does.
__device__ __forceinline__ int tap_at(const PoolAxis& axis, int o, int i) {
  const int offset = i + axis.padding - o * axis.stride;
  if (axis.dilation == 1) return offset;
  return offset % axis.dilation == 0 ? offset / axis.dilation : -1;
}

// The position in window (oh, ow) of the input pixel (h, w); -1 where it lies in a gap.
__device__ __forceinline__ int position_at(const MaxPool2dParams& p, int oh, int ow, int h, int w) {
  const int kh = tap_at(p.rows, oh, h);
  const int kw = tap_at(p.columns, ow, w);
  return kh < 0 || kw < 0 ? -1 : kh * p.columns.kernel + kw;
}

// Every input pixel gathers from the windows over it, in their order.
template <typename T, int kWidth, bool kChannelsLast, typename Index>
__global__ void max_pool2d_backward_kernel(const T* __restrict__ grad_output,
                                           const uint8_t* __restrict__ argmax, T* __restrict__ grad,
                                           MaxPool2dParams p, int64_t count) {
  using A = accumulate_t<T>;
  const int64_t step = kChannelsLast ? p.channels : 1;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Place place = place_of<kWidth, kChannelsLast>(static_cast<Index>(i), p.channels,
                                                        p.rows.input, p.columns.input);
    const TapRange over_h = windows_over(p.rows, place.row);
    const TapRange over_w = windows_over(p.columns, place.column);
    const int64_t plane = place.plane * p.rows.output * p.columns.output * step + place.channel;
    A sum[kWidth] = {};
    for (int oh = over_h.begin; oh < over_h.end; ++oh) {
      for (int ow = over_w.begin; ow < over_w.end; ++ow) {
        const int position = position_at(p, oh, ow, place.row, place.column);
        const int64_t window = plane + (static_cast<int64_t>(oh) * p.columns.output + ow) * step;
        const auto g = *reinterpret_cast<const Vector<T, kWidth>*>(grad_output + window);
        const auto a = *reinterpret_cast<const Vector<uint8_t, kWidth>*>(argmax + window);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          if (a.values[v] == position) sum[v] += load(g.values[v]);
        }
      }
    }
    Vector<T, kWidth> out;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) out.values[v] = store<T>(sum[v]);
    reinterpret_cast<Vector<T, kWidth>*>(grad)[i] = out;
  }
}

// Choose a kernel's variant for a loop over `elements` elements of this layout:
// call(width, channels_last, index, count), the first three as types.
template <typename T, typename Call>
void choose_variant(const MaxPool2dParams& params, int64_t elements, bool aligned,
                    const Call& call) {
  const auto with_width = [&](auto width, auto channels_last) {
    const int64_t count = elements / width.value;
    if (count <= std::numeric_limits<uint32_t>::max()) {
      call(width, channels_last, uint32_t{}, count);
    } else {
      call(width, channels_last, int64_t{}, count);
    }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kVectorWidth<T>> wide;
  if (!params.channels_last) {
    with_width(one, std::false_type{});
  } else if (aligned && params.channels % wide.value == 0) {
    with_width(wide, std::true_type{});
  } else {
    with_width(one, std::true_type{});
  }
}

std::tuple<Tensor, Tensor> max_pool2d_cuda(const Tensor& x, const IntPair& kernel_size,
                                           const IntPair& stride, const IntPair& padding,
                                           const IntPair& dilation, bool ceil_mode) {
  return max_pool2d_host(
      x, kernel_size, stride, padding, dilation, ceil_mode,
      [](const Tensor& x, const Tensor& output, const Tensor& argmax,
         const MaxPool2dParams& params) {
        const DeviceGuard guard(x.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
          const T* in = static_cast<const T*>(x.const_data_ptr());
          T* out = static_cast<T*>(output.mutable_data_ptr());
          uint8_t* positions = static_cast<uint8_t*>(argmax.mutable_data_ptr());
          choose_variant<T>(
              params, output.numel(), is_aligned(in, out, positions),
              [&](auto width, auto channels_last, auto index, int64_t count) {
                launch(&max_pool2d_kernel<T, decltype(width)::value, decltype(channels_last)::value,
                                          decltype(index)>,
                       grid_for(count), kThreads, 0, current_stream(x), in, out, positions, params,
                       count);
              });
        });
      });
}

Tensor max_pool2d_backward_cuda(const Tensor& grad_output, const Tensor& argmax,
                                const std::vector<int64_t>& input_size, const IntPair& kernel_size,
                                const IntPair& stride, const IntPair& padding,
                                const IntPair& dilation, bool ceil_mode, bool channels_last) {
  return max_pool2d_backward_host(
      grad_output, argmax, input_size, kernel_size, stride, padding, dilation, ceil_mode,
      channels_last,
      [](const Tensor& grad_output, const Tensor& argmax, const Tensor& grad,
         const MaxPool2dParams& params) {
        const DeviceGuard guard(grad.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(grad), T, {
          const T* g = static_cast<const T*>(grad_output.const_data_ptr());
          const uint8_t* positions = static_cast<const uint8_t*>(argmax.const_data_ptr());
          T* out = static_cast<T*>(grad.mutable_data_ptr());
          choose_variant<T>(
              params, grad.numel(), is_aligned(g, positions, out),
              [&](auto width, auto channels_last, auto index, int64_t count) {
                launch(&max_pool2d_backward_kernel<T, decltype(width)::value,
                                                   decltype(channels_last)::value, decltype(index)>,
                       grid_for(count), kThreads, 0, current_stream(grad), g, positions, out,
                       params, count);
              });
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cuda));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward_cuda));
}

}  // namespace skinfast
