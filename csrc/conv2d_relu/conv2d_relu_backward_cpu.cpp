// The gradients of small convolutions, pixel by pixel that has one.
#include "conv2d_relu/conv2d_relu.h"
#include "core/transpose.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// Sums kept in registers: kernel rows x vectors of a row, the rows at most kMaxRows.
constexpr int kMaxRows = 3;
#if defined(__AVX512F__)
constexpr int kMaxVectors = 7;
#else
constexpr int kMaxVectors = 4;
#endif

SKINFAST_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The pixels of one image that have a gradient, filter by filter and row by row of the output:
// pixel is the first tap's, in the padded map; those of filter k, row i are the numbers
// [begin[k * (rows + 1) + i], begin[k * (rows + 1) + i + 1]).
template <typename A>
struct Pixels {
  int32_t* pixel;
  A* gradient;
  int32_t* begin;
};

template <typename T>
void find_pixels(const PooledConv2d& conv, const T* grad_output, const T* output,
                 const uint8_t* argmax, const Pixels<accumulate_t<T>>& pixels) {
  const int64_t rows = conv.rows(), columns = conv.columns();
  const int32_t width = static_cast<int32_t>(conv.padded_width());
  const int32_t window_width = static_cast<int32_t>(conv.window.width);
  int32_t of_position[256];  // bytes that no forward pass writes lead to 0
  for (int32_t a = 0; a < 256; ++a) {
    const bool inside = a < conv.window.size();
    of_position[a] = inside ? a / window_width * width + a % window_width : 0;
  }
  int32_t count = 0;
  for (int64_t k = 0; k < conv.K; ++k) {
    for (int64_t i = 0; i < rows; ++i) {
      pixels.begin[k * (rows + 1) + i] = count;
      int32_t origin = static_cast<int32_t>(i * conv.window.height) * width;
      const int64_t row = (k * rows + i) * columns;
      for (int64_t j = 0; j < columns; ++j, origin += window_width) {
        const bool passes = relu_passes(load(output[row + j]));
        pixels.pixel[count] = origin + (argmax ? of_position[argmax[row + j]] : 0);
        pixels.gradient[count] = load(grad_output[row + j]);
        count += passes;
      }
    }
    pixels.begin[k * (rows + 1) + rows] = count;
  }
}

// An image with channels last and its padding: x [C, H, W] -> padded [padded_height, padded_width,
// C]. Where fewer channels than lanes are stored, the next pixel writes over the rest.
template <typename T>
void pad_image(const PooledConv2d& conv, const T* x, accumulate_t<T>* padded) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t size = conv.padded_pixels() * conv.C;
  memset(padded, 0, static_cast<size_t>(size) * sizeof(A));
  for (int64_t h = 0; h < conv.H; ++h) {
    A* row = padded + ((h + conv.pad_h) * conv.padded_width() + conv.pad_w) * conv.C;
    for (int64_t w = 0; w < conv.W; ++w) {
      for (int64_t c = 0; c < conv.C; ++c) {
        row[w * conv.C + c] = A(load(x[(c * conv.H + h) * conv.W + w]));
      }
    }
  }
  (void)L;
}

// sums[row][v] += the gradients times the kRows x kVectors vectors at their pixels.
template <typename A, int kRows, int kVectors>
void add_patches(const A* x, int64_t row_size, int64_t channels, const int32_t* pixel,
                 const A* gradient, int64_t count, A* sums, int64_t sums_row) {
  constexpr int L = kLanes<A>;
  // Few sums would wait for each other.
  constexpr int kWays = kRows * kVectors <= 6 ? 2 : 1;
  vector_t<A> sum[kWays][kRows][kVectors] = {};
  int64_t i = 0;
  for (; i + kWays <= count; i += kWays) {
    for (int way = 0; way < kWays; ++way) {
      const A* patch = x + pixel[i + way] * channels;
      const A g = gradient[i + way];
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          sum[way][r][v] += g * load_vector(patch + r * row_size + v * L);
        }
      }
    }
  }
  for (; i < count; ++i) {
    const A* patch = x + pixel[i] * channels;
    const A g = gradient[i];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sum[0][r][v] += g * load_vector(patch + r * row_size + v * L);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      A* target = sums + r * sums_row + v * L;
      vector_t<A> total = load_vector(target) + sum[0][r][v];
      if constexpr (kWays == 2) total += sum[1][r][v];
      store_vector(target, total);
    }
  }
}

template <typename A>
using AddPatches = void (*)(const A*, int64_t, int64_t, const int32_t*, const A*, int64_t, A*,
                            int64_t);

template <typename A, int kRows>
AddPatches<A> add_patches_of(int64_t vectors) {
  static constexpr AddPatches<A> functions[] = {
      &add_patches<A, kRows, 1>, &add_patches<A, kRows, 2>, &add_patches<A, kRows, 3>,
      &add_patches<A, kRows, 4>,
#if defined(__AVX512F__)
      &add_patches<A, kRows, 5>, &add_patches<A, kRows, 6>, &add_patches<A, kRows, 7>,
#endif
  };
  static_assert(sizeof(functions) / sizeof(functions[0]) == kMaxVectors);
  return functions[vectors - 1];
}

// sums [R, patch_row] += the gradient of one filter's weights from one image.
template <typename A>
void add_weight_gradient(const PooledConv2d& conv, const A* padded, const int32_t* pixel,
                         const A* gradient, int64_t count, A* sums) {
  constexpr int L = kLanes<A>;
  const int64_t row_size = conv.padded_width() * conv.C;
  const int64_t vectors = ceil_div(conv.S * conv.C, L);
  for (int64_t r = 0; r < conv.R; r += kMaxRows) {
    const int64_t rows = smaller(kMaxRows, conv.R - r);
    for (int64_t v = 0; v < vectors; v += kMaxVectors) {
      const int64_t some = smaller(kMaxVectors, vectors - v);
      const AddPatches<A> add = rows == 3   ? add_patches_of<A, 3>(some)
                                : rows == 2 ? add_patches_of<A, 2>(some)
                                            : add_patches_of<A, 1>(some);
      add(padded + r * row_size + v * L, row_size, conv.C, pixel, gradient, count,
          sums + r * conv.patch_row() + v * L, conv.patch_row());
    }
  }
}

// grad [padded_height, padded_width, 16] += the gradient of x from one image, output row by output
// row, so that the rows of grad at hand stay in the nearest cache.
template <typename A>
void add_input_gradient(const PooledConv2d& conv, const A* turned_weight, const Pixels<A>& pixels,
                        A* grad) {
  constexpr int L = kLanes<A>;
  const int64_t rows = conv.rows(), row_size = conv.padded_width() * kSmallChannels;
  const int64_t vectors = ceil_div(conv.C, L);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < conv.K; ++k) {
      const int32_t* begin = pixels.begin + k * (rows + 1) + i;
      const A* weight = turned_weight + k * conv.R * conv.S * kSmallChannels;
      for (int32_t p = begin[0]; p < begin[1]; ++p) {
        const A g = pixels.gradient[p];
        A* first = grad + pixels.pixel[p] * kSmallChannels;
        for (int64_t r = 0; r < conv.R; ++r) {
          A* target = first + r * row_size;
          const A* taps = weight + r * conv.S * kSmallChannels;
          for (int64_t s = 0; s < conv.S * kSmallChannels; s += kSmallChannels) {
            for (int64_t v = 0; v < vectors * L; v += L) {
              store_vector(target + s + v,
                           load_vector(target + s + v) + g * load_vector(taps + s + v));
            }
          }
        }
      }
    }
  }
}

// grad [padded_height, padded_width, 16] -> grad_x [C, H, W]
template <typename T>
void store_input_gradient(const PooledConv2d& conv, const accumulate_t<T>* grad, T* grad_x) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  for (int64_t h = 0; h < conv.H; ++h) {
    const A* row = grad + ((h + conv.pad_h) * conv.padded_width() + conv.pad_w) * kSmallChannels;
    for (int64_t w = 0; w < conv.W; w += L) {
      const int count = static_cast<int>(smaller(L, conv.W - w));
      for (int64_t first = 0; first < conv.C; first += L) {
        vector_t<A> block[L] = {};
        for (int j = 0; j < count; ++j) {
          block[j] = load_vector(row + (w + j) * kSmallChannels + first);
        }
        transpose<A>(block);
        const int64_t channels = smaller(L, conv.C - first);
        for (int64_t c = 0; c < channels; ++c) {
          T* target = grad_x + ((first + c) * conv.H + h) * conv.W + w;
          if (count == L) {
            store_vector(target, block[c]);
          } else {
            store_partial(target, block[c], count);
          }
        }
      }
    }
  }
}

template <typename T>
void gradients_of_task(const PooledConv2d& conv, const SmallConv2dGradients& all,
                       accumulate_t<T>* scratch, int64_t task) {
  using A = accumulate_t<T>;
  const int64_t outputs = conv.K * conv.rows() * conv.columns();
  const int64_t inputs = conv.C * conv.H * conv.W;
  A* padded = scratch;
  A* grad = padded + conv.padded_pixels() * conv.C + kImageBlock;
  A* gradient = grad + conv.padded_pixels() * kSmallChannels + kImageBlock;
  auto* pixel = reinterpret_cast<int32_t*>(gradient + outputs);
  const Pixels<A> pixels{pixel, gradient, pixel + outputs};

  A* weight_sums = static_cast<A*>(all.weight_sums) + task * conv.weight_sums();
  A* bias_sums = static_cast<A*>(all.bias_sums) + task * conv.K;
  if (all.weight_sums) {
    memset(weight_sums, 0, static_cast<size_t>(conv.weight_sums()) * sizeof(A));
  }
  double bias_total[kSmallChannels] = {};
  const int64_t end = smaller(conv.N, (task + 1) * PooledConv2d::kGradientImages);
  for (int64_t n = task * PooledConv2d::kGradientImages; n < end; ++n) {
    find_pixels(conv, static_cast<const T*>(all.grad_output) + n * outputs,
                static_cast<const T*>(all.output) + n * outputs,
                all.argmax ? all.argmax + n * outputs : nullptr, pixels);
    if (all.weight_sums) pad_image(conv, static_cast<const T*>(all.x) + n * inputs, padded);
    for (int64_t k = 0; k < conv.K; ++k) {
      const int64_t first = pixels.begin[k * (conv.rows() + 1)];
      const int64_t count = pixels.begin[k * (conv.rows() + 1) + conv.rows()] - first;
      for (int64_t p = first; p < first + count; ++p) bias_total[k] += pixels.gradient[p];
      if (!all.weight_sums) continue;
      add_weight_gradient(conv, padded, pixels.pixel + first, pixels.gradient + first, count,
                          weight_sums + k * conv.R * conv.patch_row());
    }
    if (all.grad_x) {
      memset(grad, 0, static_cast<size_t>(conv.padded_pixels() * kSmallChannels) * sizeof(A));
      add_input_gradient(conv, static_cast<const A*>(all.turned_weight), pixels, grad);
      store_input_gradient(conv, grad, static_cast<T*>(all.grad_x) + n * inputs);
    }
  }
  for (int64_t k = 0; k < conv.K; ++k) bias_sums[k] = A(bias_total[k]);
}

}  // namespace

void pack_turned_weight(DType dtype, const PooledConv2d& conv, const void* weight, void* packed) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const T* source = static_cast<const T*>(weight);
    const int64_t taps = conv.R * conv.S;
    memset(packed, 0, static_cast<size_t>(conv.K * taps * kSmallChannels) * sizeof(A));
    for (int64_t k = 0; k < conv.K; ++k) {
      A* target = static_cast<A*>(packed) + k * taps * kSmallChannels;
      for (int64_t c = 0; c < conv.C; ++c) {
        for (int64_t t = 0; t < taps; ++t) {
          target[t * kSmallChannels + c] = A(load(source[(k * conv.C + c) * taps + t]));
        }
      }
    }
  });
}

void small_conv2d_gradients(DType dtype, const PooledConv2d& conv,
                            const SmallConv2dGradients& gradients, void* scratch, int64_t begin,
                            int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t task = begin; task < end; ++task) {
      gradients_of_task<T>(conv, gradients, static_cast<accumulate_t<T>*>(scratch), task);
    }
  });
}

void sum_small_conv2d_gradients(DType dtype, const PooledConv2d& conv,
                                const SmallConv2dGradients& gradients, void* grad_weight,
                                void* grad_bias) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const auto total = [&](const void* sums, int64_t size, int64_t at) {
      double sum = 0;
      for (int64_t task = 0; task < conv.backward_tasks(); ++task) {
        sum += static_cast<const A*>(sums)[task * size + at];
      }
      return store<T>(A(sum));
    };
    for (int64_t k = 0; k < conv.K; ++k) {
      static_cast<T*>(grad_bias)[k] = total(gradients.bias_sums, conv.K, k);
      for (int64_t c = 0; grad_weight && c < conv.C; ++c) {
        for (int64_t t = 0; t < conv.R * conv.S; ++t) {
          const int64_t at = (k * conv.R + t / conv.S) * conv.patch_row() + t % conv.S * conv.C + c;
          static_cast<T*>(grad_weight)[(k * conv.C + c) * conv.R * conv.S + t] =
              total(gradients.weight_sums, conv.weight_sums(), at);
        }
      }
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA
