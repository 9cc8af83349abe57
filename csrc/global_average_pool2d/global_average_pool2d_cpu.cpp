#include "global_average_pool2d/global_average_pool2d.h"

#include "core/vector.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// So many pixels are added before their sum is added to the others': sums of many keep their
// digits.
constexpr int64_t kPixelBlock = 64;

SKINFAST_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// V is one channel or a vector of them.
template <typename V, typename T>
SKINFAST_HOST_DEVICE V read(const T* source) {
  if constexpr (sizeof(V) == sizeof(accumulate_t<T>)) {
    return load(*source);
  } else {
    return load_vector(source);
  }
}
template <typename V, typename T>
SKINFAST_HOST_DEVICE void write(T* target, V value) {
  if constexpr (sizeof(V) == sizeof(accumulate_t<T>)) {
    *target = store<T>(value);
  } else {
    store_vector(target, value);
  }
}

// The means of kCount neighbouring V of one image, whose pixels lie `step` apart.
template <typename V, int kCount, typename T>
SKINFAST_HOST_DEVICE void average(const T* x, int64_t step, int64_t pixels, T* output) {
  using A = accumulate_t<T>;
  constexpr int kWidth = sizeof(V) / sizeof(A);
  V totals[kCount] = {};
  for (int64_t first = 0; first < pixels; first += kPixelBlock) {
    V sums[kCount] = {};
    const T* end = x + smaller(pixels, first + kPixelBlock) * step;
    for (const T* pixel = x + first * step; pixel != end; pixel += step) {
      for (int v = 0; v < kCount; ++v) sums[v] += read<V>(pixel + v * kWidth);
    }
    for (int v = 0; v < kCount; ++v) totals[v] += sums[v];
  }
  for (int v = 0; v < kCount; ++v) {
    write(output + v * kWidth, share_of(totals[v], static_cast<A>(pixels)));
  }
}

// Four vectors at a time: whole cache lines, whose next pixel may lie where this one's neighbours
// would be evicted.
template <typename T>
void average_channels_last(const T* x, T* output, const GlobalAveragePool2dParams& p, int64_t begin,
                           int64_t end) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  for (int64_t i = begin; i < end;) {
    const int64_t n = i / p.channels;
    const int64_t stop = smaller(end, (n + 1) * p.channels);
    const T* image = x + n * (p.pixels - 1) * p.channels;  // + i: its first pixel in channel i
    for (; i + 4 * kLanes<A> <= stop; i += 4 * kLanes<A>) {
      average<V, 4>(image + i, p.channels, p.pixels, output + i);
    }
    for (; i + kLanes<A> <= stop; i += kLanes<A>) {
      average<V, 1>(image + i, p.channels, p.pixels, output + i);
    }
    for (; i < stop; ++i) average<A, 1>(image + i, p.channels, p.pixels, output + i);
  }
}

// The lanes of a vector are pixels of one map; what is left over is added last.
template <typename T>
SKINFAST_HOST_DEVICE accumulate_t<T> sum_map(const T* map, int64_t pixels) {
  using A = accumulate_t<T>;
  const int64_t whole = pixels / kLanes<A> * kLanes<A>;
  A sum = 0;
  if (whole > 0) {
    vector_t<A> lanes{};
    for (int64_t k = 0; k < whole; k += kLanes<A>) lanes += load_vector(map + k);
    for (int half = kLanes<A> / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    sum = lanes[0];
  }
  for (int64_t k = whole; k < pixels; ++k) sum += load(map[k]);
  return sum;
}

template <typename T>
void average_contiguous(const T* x, T* output, const GlobalAveragePool2dParams& p, int64_t begin,
                        int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const accumulate_t<T> sum = sum_map(x + i * p.pixels, p.pixels);
    output[i] = store<T>(share_of(sum, static_cast<accumulate_t<T>>(p.pixels)));
  }
}

// The first pixel is computed, the others are copies of it while a cache still holds it.
template <typename T>
void spread_channels_last(const T* __restrict grad_output, T* __restrict grad,
                          const GlobalAveragePool2dParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end;) {
    const int64_t n = i / p.channels;
    const int64_t count = smaller(end, (n + 1) * p.channels) - i;
    T* __restrict first = grad + n * (p.pixels - 1) * p.channels + i;
    for (int64_t k = 0; k < count; ++k) {
      first[k] = store<T>(share_of(load(grad_output[i + k]), static_cast<A>(p.pixels)));
    }
    for (int64_t k = 1; k < p.pixels; ++k) {
      memcpy(first + k * p.channels, first, static_cast<size_t>(count) * sizeof(T));
    }
    i += count;
  }
}

template <typename T>
void spread_contiguous(const T* grad_output, T* grad, const GlobalAveragePool2dParams& p,
                       int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T share = store<T>(share_of(load(grad_output[i]), static_cast<A>(p.pixels)));
    T* map = grad + i * p.pixels;
    for (int64_t k = 0; k < p.pixels; ++k) map[k] = share;
  }
}

}  // namespace

void global_average_pool2d(DType dtype, const void* x, void* output,
                           const GlobalAveragePool2dParams& params, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto kernel = params.channels_last ? &average_channels_last<T> : &average_contiguous<T>;
    kernel(static_cast<const T*>(x), static_cast<T*>(output), params, begin, end);
  });
}

void global_average_pool2d_backward(DType dtype, const void* grad_output, void* grad,
                                    const GlobalAveragePool2dParams& params, int64_t begin,
                                    int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto kernel = params.channels_last ? &spread_channels_last<T> : &spread_contiguous<T>;
    kernel(static_cast<const T*>(grad_output), static_cast<T*>(grad), params, begin, end);
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include <algorithm>

#include "core/parallel.h"

namespace skinfast {
namespace {

// `kernel(begin, end)` on ranges of the means; how they are cut changes no sum.
template <typename Kernel>
void for_each_mean(const GlobalAveragePool2dParams& params, const Kernel& kernel) {
  parallel_for(params.batch * params.channels, std::max<int64_t>(1, kElementGrain / params.pixels),
               kernel);
}

Tensor global_average_pool2d_cpu(const Tensor& x) {
  return global_average_pool2d_host(
      x, [](const Tensor& x, const Tensor& output, const GlobalAveragePool2dParams& params) {
        for_each_mean(params, [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(global_average_pool2d)
          (dtype_of(x), x.const_data_ptr(), output.mutable_data_ptr(), params, begin, end);
        });
      });
}

Tensor global_average_pool2d_backward_cpu(const Tensor& grad_output,
                                          const std::vector<int64_t>& input_size,
                                          bool channels_last) {
  return global_average_pool2d_backward_host(
      grad_output, input_size, channels_last,
      [](const Tensor& grad_output, const Tensor& grad, const GlobalAveragePool2dParams& params) {
        for_each_mean(params, [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(global_average_pool2d_backward)
          (dtype_of(grad), grad_output.const_data_ptr(), grad.mutable_data_ptr(), params, begin,
           end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("global_average_pool2d", TORCH_BOX(&global_average_pool2d_cpu));
  m.impl("global_average_pool2d_backward", TORCH_BOX(&global_average_pool2d_backward_cpu));
}

}  // namespace skinfast
#endif
