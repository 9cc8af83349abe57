#include "max_pool2d/max_pool2d.h"

#include "core/lanes.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// The lanes are channels or columns. Where fewer than kLaneBlock are left but the tensors go on, a
// block still takes kLaneBlock: what it writes past its own lanes the next block, on its right,
// writes again.

static inline int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
static inline int divide_up(int a, int b) { return a <= 0 ? 0 : (a + b - 1) / b; }

// Maxima over one window each, for kLaneBlock neighbouring lanes.
template <typename T>
struct Lanes {
  using A = accumulate_t<T>;
  A maximum[kLaneBlock];
  integer_for<A> argmax[kLaneBlock];
};

template <typename T>
SKINFAST_HOST_DEVICE void store_lanes(const Lanes<T>& lanes, T* __restrict output,
                                      uint8_t* __restrict argmax, int count) {
  SKINFAST_FOR_LANES(i, count) output[i] = store<T>(lanes.maximum[i]);
  SKINFAST_FOR_LANES(i, count) argmax[i] = static_cast<uint8_t>(lanes.argmax[i]);
}

// `count` channels of one window; `pixels` points at the window's origin, which may lie outside.
template <typename T>
SKINFAST_HOST_DEVICE void pool_window(const T* pixels, T* output, uint8_t* argmax,
                                      const MaxPool2dParams& p, TapRange taps_h, TapRange taps_w,
                                      int count) {
  using A = accumulate_t<T>;
  Lanes<T> lanes;
  SKINFAST_FOR_LANES(i, count) {
    lanes.maximum[i] = minus_infinity<A>();
    lanes.argmax[i] = taps_h.begin * p.columns.kernel + taps_w.begin;
  }
  for (int kh = taps_h.begin; kh < taps_h.end; ++kh) {
    for (int kw = taps_w.begin; kw < taps_w.end; ++kw) {
      const int64_t pixel = static_cast<int64_t>(kh) * p.rows.dilation * p.columns.input +
                            static_cast<int64_t>(kw) * p.columns.dilation;
      const T* __restrict in = pixels + pixel * p.channels;
      const integer_for<A> position = kh * p.columns.kernel + kw;
      SKINFAST_FOR_LANES(i, count) {
        take_maximum(load(in[i]), position, lanes.maximum[i], lanes.argmax[i]);
      }
    }
  }
  store_lanes(lanes, output, argmax, count);
}

template <typename T>
void pool_channels_last(const T* x, T* output, uint8_t* argmax, const MaxPool2dParams& p,
                        int64_t begin, int64_t end) {
  const int64_t image_size = static_cast<int64_t>(p.rows.input) * p.columns.input * p.channels;
  const int64_t output_end = end * p.columns.output * p.channels;
  for (int64_t row = begin; row < end; ++row) {  // (n, output row)
    const int oh = static_cast<int>(row % p.rows.output);
    const int64_t n = row / p.rows.output;
    const TapRange taps_h = taps_inside(p.rows, oh);
    const int64_t h = oh * p.rows.stride - p.rows.padding;
    for (int ow = 0; ow < p.columns.output; ++ow) {
      const TapRange taps_w = taps_inside(p.columns, ow);
      const int64_t w = ow * p.columns.stride - p.columns.padding;
      const int64_t last_pixel = (h + (taps_h.end - 1) * p.rows.dilation) * p.columns.input + w +
                                 (taps_w.end - 1) * p.columns.dilation;
      const int64_t last_read = n * image_size + last_pixel * p.channels;
      for (int64_t c = 0; c < p.channels; c += kLaneBlock) {
        const T* pixels = x + n * image_size + (h * p.columns.input + w) * p.channels + c;
        const int64_t place = (row * p.columns.output + ow) * p.channels + c;
        if (place + kLaneBlock <= output_end &&
            last_read + c + kLaneBlock <= p.batch * image_size) {
          pool_window(pixels, output + place, argmax + place, p, taps_h, taps_w, kLaneBlock);
        } else {
          pool_window(pixels, output + place, argmax + place, p, taps_h, taps_w,
                      smaller(kLaneBlock, p.channels - c));
        }
      }
    }
  }
}

// `count` neighbouring kKernel x kKernel windows; a maximum never leaves its register.
template <int kKernel, typename T>
SKINFAST_HOST_DEVICE void pool_tile_run(const T* __restrict in, int64_t width, T* output,
                                        uint8_t* argmax, int count) {
  using A = accumulate_t<T>;
  Lanes<T> lanes;
  SKINFAST_FOR_LANES(i, count) {
    A maximum = load(in[i * kKernel]);
    integer_for<A> position = 0;
    for (int k = 1; k < kKernel * kKernel; ++k) {
      const T value = in[k / kKernel * width + i * kKernel + k % kKernel];
      take_maximum(load(value), static_cast<integer_for<A>>(k), maximum, position);
    }
    lanes.maximum[i] = maximum;
    lanes.argmax[i] = position;
  }
  store_lanes(lanes, output, argmax, count);
}

template <int kKernel, typename T>
void pool_tiles(const T* x, T* output, uint8_t* argmax, const MaxPool2dParams& p, int64_t begin,
                int64_t end) {
  const int64_t width = p.columns.input;
  const int64_t x_end = p.batch * p.channels * p.rows.input * width;
  const int64_t output_end = end * p.columns.output;
  for (int64_t row = begin; row < end; ++row) {  // (n, c, output row)
    const int64_t h = row / p.rows.output * p.rows.input + row % p.rows.output * kKernel;
    for (int ow = 0; ow < p.columns.output; ow += kLaneBlock) {
      const int64_t from = h * width + ow * kKernel;
      const int64_t place = row * p.columns.output + ow;
      const int count = smaller(kLaneBlock, p.columns.output - ow);
      const bool room = place + kLaneBlock <= output_end &&
                        from + (kKernel - 1) * width + kLaneBlock * kKernel <= x_end;
      if (room && count > kLaneBlock / 4) {
        pool_tile_run<kKernel>(x + from, width, output + place, argmax + place, kLaneBlock);
      } else {
        pool_tile_run<kKernel>(x + from, width, output + place, argmax + place, count);
      }
    }
  }
}

// Any window, contiguous: the lanes are a run of output columns.
template <typename T>
void pool_contiguous(const T* x, T* output, uint8_t* argmax, const MaxPool2dParams& p,
                     int64_t begin, int64_t end) {
  const PoolAxis& columns = p.columns;
  for (int64_t row = begin; row < end; ++row) {  // (n, c, output row)
    const int oh = static_cast<int>(row % p.rows.output);
    const T* plane = x + row / p.rows.output * p.rows.input * columns.input;
    const TapRange taps_h = taps_inside(p.rows, oh);
    for (int ow = 0; ow < columns.output; ow += kLaneBlock) {
      const int count = smaller(kLaneBlock, columns.output - ow);
      Lanes<T> lanes;
      for (int i = 0; i < count; ++i) {
        lanes.maximum[i] = minus_infinity<accumulate_t<T>>();
        lanes.argmax[i] = taps_h.begin * columns.kernel + taps_inside(columns, ow + i).begin;
      }
      for (int kh = taps_h.begin; kh < taps_h.end; ++kh) {
        const int64_t h = oh * p.rows.stride - p.rows.padding + kh * p.rows.dilation;
        for (int kw = 0; kw < columns.kernel; ++kw) {
          // Lane i looks at column w + i * stride; the lanes from first to last are inside.
          const int w = ow * columns.stride - columns.padding + kw * columns.dilation;
          const int first = divide_up(-w, columns.stride);
          const int last = smaller(count, divide_up(columns.input - w, columns.stride));
          const T* __restrict in = plane + h * columns.input + w;
          for (int i = first; i < last; ++i) {
            take_maximum(load(in[int64_t{i} * columns.stride]),
                         integer_for<accumulate_t<T>>{kh * columns.kernel + kw}, lanes.maximum[i],
                         lanes.argmax[i]);
          }
        }
      }
      const int64_t place = row * columns.output + ow;
      store_lanes(lanes, output + place, argmax + place, count);
    }
  }
}

}  // namespace

void max_pool2d(DType dtype, const void* x, void* output, uint8_t* argmax,
                const MaxPool2dParams& params, int64_t begin, int64_t end) {
  const auto tiled = [&](int k) {
    return tiles(params) && params.rows.kernel == k && params.columns.kernel == k;
  };
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto kernel = params.channels_last ? &pool_channels_last<T>
                        : tiled(2)           ? &pool_tiles<2, T>
                        : tiled(3)           ? &pool_tiles<3, T>
                        : tiled(4)           ? &pool_tiles<4, T>
                                             : &pool_contiguous<T>;
    kernel(static_cast<const T*>(x), static_cast<T*>(output), argmax, params, begin, end);
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

std::tuple<Tensor, Tensor> max_pool2d_cpu(const Tensor& x, const IntPair& kernel_size,
                                          const IntPair& stride, const IntPair& padding,
                                          const IntPair& dilation, bool ceil_mode) {
  return max_pool2d_host(
      x, kernel_size, stride, padding, dilation, ceil_mode,
      [](const Tensor& x, const Tensor& output, const Tensor& argmax,
         const MaxPool2dParams& params) {
        const int64_t rows = pool_maps(params) * params.rows.output;
        parallel_for(rows, pool_grain(rows, output), [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(max_pool2d)
          (dtype_of(x), x.const_data_ptr(), output.mutable_data_ptr(),
           static_cast<uint8_t*>(argmax.mutable_data_ptr()), params, begin, end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cpu)); }

}  // namespace skinfast
#endif
