// The CUDA kernels of max_pool2d, which batch_norm_relu_max_pool2d shares.
#pragma once

#include <limits>
#include <type_traits>

#include "core/cuda.h"
#include "max_pool2d/max_pool2d.h"

namespace skinfast {

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

// What a pool makes of a tap, and of a window's result: nothing.
template <typename T_>
struct StoredTaps {
  using T = T_;
  using A = accumulate_t<T>;
  template <int kWidth>
  struct Channels {};

  template <int kWidth>
  __device__ Channels<kWidth> channels(int64_t) const {
    return {};
  }
  template <int kWidth>
  __device__ A value(const Channels<kWidth>&, int, T tap) const {
    return load(tap);
  }
  __device__ uint8_t position(A, int position) const { return static_cast<uint8_t>(position); }
};

template <typename Taps, int kWidth, bool kChannelsLast, typename Index>
__global__ void max_pool2d_kernel(Taps taps, const typename Taps::T* __restrict__ x,
                                  typename Taps::T* __restrict__ output,
                                  uint8_t* __restrict__ argmax, MaxPool2dParams p, int64_t count) {
  using T = typename Taps::T;
  using A = accumulate_t<T>;
  const int64_t step = kChannelsLast ? p.channels : 1;  // from one pixel to the next
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Place place = place_of<kWidth, kChannelsLast>(static_cast<Index>(i), p.channels,
                                                        p.rows.output, p.columns.output);
    const TapRange taps_h = taps_inside(p.rows, place.row);
    const TapRange taps_w = taps_inside(p.columns, place.column);
    const auto channels =
        taps.template channels<kWidth>(kChannelsLast ? place.channel : place.plane % p.channels);
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
          take_maximum(taps.value(channels, v, in.values[v]), kh * p.columns.kernel + kw,
                       maximum[v], position[v]);
        }
      }
    }
    Vector<T, kWidth> out;
    Vector<uint8_t, kWidth> positions;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      out.values[v] = store<T>(maximum[v]);
      positions.values[v] = taps.position(maximum[v], position[v]);
    }
    reinterpret_cast<Vector<T, kWidth>*>(output)[i] = out;
    reinterpret_cast<Vector<uint8_t, kWidth>*>(argmax)[i] = positions;
  }
}

// What an input pixel, at `place`, gathers from the windows over it, in their order.
template <typename T, int kWidth, bool kChannelsLast>
__device__ __forceinline__ Vector<T, kWidth> gathered(const T* __restrict__ grad_output,
                                                      const uint8_t* __restrict__ argmax,
                                                      const MaxPool2dParams& p,
                                                      const Place& place) {
  using A = accumulate_t<T>;
  const int64_t step = kChannelsLast ? p.channels : 1;
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
  return out;
}

template <typename T, int kWidth, bool kChannelsLast, typename Index>
__global__ void max_pool2d_backward_kernel(const T* __restrict__ grad_output,
                                           const uint8_t* __restrict__ argmax, T* __restrict__ grad,
                                           MaxPool2dParams p, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Place place = place_of<kWidth, kChannelsLast>(static_cast<Index>(i), p.channels,
                                                        p.rows.input, p.columns.input);
    reinterpret_cast<Vector<T, kWidth>*>(grad)[i] =
        gathered<T, kWidth, kChannelsLast>(grad_output, argmax, p, place);
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

}  // namespace skinfast
