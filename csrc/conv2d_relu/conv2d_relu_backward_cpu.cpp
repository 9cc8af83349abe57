// The gradients of small convolutions, pixel by pixel that has one.
#include "conv2d_relu/conv2d_relu_pixels.h"
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

// Three planes of pixels made one row of pixels of three channels.
template <typename A>
struct Interleave {
  lane_integers<A> first_two[3]{}, third[3]{};  // where each lane comes from

  Interleave() {
    constexpr int L = kLanes<A>;
    for (int e = 0; e < 3 * L; ++e) {
      const int lane = e % L, c = e % 3, pixel = e / 3;
      first_two[e / L][lane] = c == 1 ? L + pixel : pixel;
      third[e / L][lane] = c == 2 ? L + pixel : lane;
    }
  }

  // How many of `count` pixels were written, the planes being `plane` apart.
  template <typename T, typename Image>
  int64_t row(const T* x, int64_t plane, int64_t count, Image* target) const {
    int64_t w = 0;
#if !defined(__clang__)
    constexpr int L = kLanes<A>;
    for (; w + L <= count; w += L, target += 3 * L) {
      const vector_t<A> r = load_vector(x + w), g = load_vector(x + plane + w);
      const vector_t<A> b = load_vector(x + 2 * plane + w);
      for (int v = 0; v < 3; ++v) {
        store_vector(target + v * L,
                     __builtin_shuffle(__builtin_shuffle(r, g, first_two[v]), b, third[v]));
      }
    }
#endif
    return w;
  }
};

// An image with channels last and its padding: x [C, H, W] -> padded [padded_height, padded_width,
// C].
template <typename T>
void pad_image(const PooledConv2d& conv, const T* x, factor_t<T>* padded) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const Interleave<A> interleave;
  const int64_t C = conv.C, plane = conv.H * conv.W;
  memset(padded, 0, static_cast<size_t>(conv.padded_pixels() * C) * sizeof(*padded));
  for (int64_t h = 0; h < conv.H; ++h, x += conv.W) {
    factor_t<T>* row = padded + ((h + conv.pad_h) * conv.padded_width() + conv.pad_w) * C;
    int64_t w = 0;
    if (C == 3) w = interleave.row(x, plane, conv.W, row);
    // A vector writes zeros behind its own channels, where padding lies or pixels that come later,
    // or behind the image the scratch's spare vector.
    for (; C > L / 2 && C <= L && w + L <= conv.W; w += L) {
      vector_t<A> block[L];
      for (int c = 0; c < L; ++c) {
        block[c] = c < C ? load_vector(x + c * plane + w) : vector_t<A>{};
      }
      transpose<A>(block);
      for (int j = 0; j < L; ++j) store_vector(row + (w + j) * C, block[j]);
    }
    for (; w < conv.W; ++w) {
      for (int64_t c = 0; c < C; ++c) row[w * C + c] = factor(x[c * plane + w]);
    }
  }
}

// sum[row][v] += the gradients of `count` pixels, kTerms at most, times the kRows x kVectors
// vectors at each.
template <typename T, int kRows, int kVectors, typename A = accumulate_t<T>>
SKINFAST_HOST_DEVICE void add_patch(const factor_t<T>* x, int64_t row_size, int64_t channels,
                                    const int32_t* pixel, const factor_t<T>* gradient,
                                    [[maybe_unused]] int64_t count,
                                    vector_t<A> (&sum)[kRows][kVectors]) {
  constexpr int L = kLanes<A>;
  const factor_t<T>* patch = x + pixel[0] * channels;
#if defined(__AVX512BF16__)
  if constexpr (kTerms<T> == 2) {
    // Put in turns as they lie; widened first, as the forward pass does it, they took twice as
    // long.
    alignas(64) static constexpr uint16_t kInTurns[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i in_turns = _mm512_load_si512(kInTurns);
    uint32_t both = gradient[0].bits;
    if (count == 2) memcpy(&both, gradient, sizeof(both));
    const auto g = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(both)));
    const BFloat16* second = count == 2 ? x + pixel[1] * channels : nullptr;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const auto load_half = [at = r * row_size + v * L](const BFloat16* pixels) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels + at));
        };
        // Where there is no second pixel its half is zero, as its gradient is: 0 * infinity is NaN.
        const __m256i one = load_half(patch);
        const __m512i two = second ? _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(one),
                                                              load_half(second), 1)
                                   : _mm512_maskz_broadcast_i64x4(0x0f, one);
        const __m512i mixed = _mm512_maskz_permutexvar_epi16(0xffffffff, in_turns, two);
        const auto pairs = reinterpret_cast<__m512bh>(mixed);
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], g, pairs);
      }
    }
    return;
  }
#endif
  const A g = load(gradient[0]);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] += g * load_vector(patch + r * row_size + v * L);
    }
  }
}

// sums[row][v] += the gradients times the kRows x kVectors vectors at their pixels.
template <typename T, int kRows, int kVectors, typename A = accumulate_t<T>>
void add_patches(const factor_t<T>* x, int64_t row_size, int64_t channels, const int32_t* pixel,
                 const factor_t<T>* gradient, int64_t count, A* sums, int64_t sums_row) {
  constexpr int L = kLanes<A>;
  // Few sums would wait for each other.
  constexpr int kWays = kRows * kVectors <= 6 ? 2 : 1;
  vector_t<A> sum[kWays][kRows][kVectors] = {};
  int64_t i = 0;
  for (; i + kWays * kTerms<T> <= count; i += kWays * kTerms<T>) {
    for (int way = 0; way < kWays; ++way) {
      const int64_t at = i + way * kTerms<T>;
      add_patch<T>(x, row_size, channels, pixel + at, gradient + at, kTerms<T>, sum[way]);
    }
  }
  for (; i < count; i += kTerms<T>) {
    add_patch<T>(x, row_size, channels, pixel + i, gradient + i, smaller(kTerms<T>, count - i),
                 sum[0]);
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

template <typename T>
using AddPatches = void (*)(const factor_t<T>*, int64_t, int64_t, const int32_t*,
                            const factor_t<T>*, int64_t, accumulate_t<T>*, int64_t);

template <typename T, int kRows>
AddPatches<T> add_patches_of(int64_t vectors) {
  static constexpr AddPatches<T> functions[] = {
      &add_patches<T, kRows, 1>, &add_patches<T, kRows, 2>, &add_patches<T, kRows, 3>,
      &add_patches<T, kRows, 4>,
#if defined(__AVX512F__)
      &add_patches<T, kRows, 5>, &add_patches<T, kRows, 6>, &add_patches<T, kRows, 7>,
#endif
  };
  static_assert(sizeof(functions) / sizeof(functions[0]) == kMaxVectors);
  return functions[vectors - 1];
}

// sums [R, patch_row] += the gradient of one filter's weights from one image.
template <typename T, typename A = accumulate_t<T>>
void add_weight_gradient(const PooledConv2d& conv, const factor_t<T>* padded, const int32_t* pixel,
                         const factor_t<T>* gradient, int64_t count, A* sums) {
  constexpr int L = kLanes<A>;
  const int64_t row_size = conv.padded_width() * conv.C;
  const int64_t vectors = ceil_div(conv.S * conv.C, L);
  for (int64_t r = 0; r < conv.R; r += kMaxRows) {
    const int64_t rows = smaller(kMaxRows, conv.R - r);
    for (int64_t v = 0; v < vectors; v += kMaxVectors) {
      const int64_t some = smaller(kMaxVectors, vectors - v);
      const AddPatches<T> add = rows == 3   ? add_patches_of<T, 3>(some)
                                : rows == 2 ? add_patches_of<T, 2>(some)
                                            : add_patches_of<T, 1>(some);
      add(padded + r * row_size + v * L, row_size, conv.C, pixel, gradient, count,
          sums + r * conv.patch_row() + v * L, conv.patch_row());
    }
  }
}

// target [S, 16] += g * taps [S, 16], the first kVectors vectors of each; S = kWidth if that is not
// 0.
template <int kWidth, int kVectors, typename A>
SKINFAST_HOST_DEVICE void add_taps(A* target, const A* taps, A g, int64_t S) {
  constexpr int L = kLanes<A>;
  const int64_t end = kWidth == 0 ? S : kWidth;
#pragma GCC unroll 7
  for (int64_t s = 0; s < end; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = s * kSmallChannels + v * L;
      store_vector(target + at, load_vector(target + at) + g * load_vector(taps + at));
    }
  }
}

// grad [padded_height, padded_width, 16] += the gradient of x from one image, output row by output
// row, so that the rows of grad at hand stay in the nearest cache.
template <typename T, int kWidth, int kVectors, typename A = accumulate_t<T>>
void add_input_gradient(const PooledConv2d& conv, const A* turned_weight, const Pixels<T>& pixels,
                        A* grad) {
  const int64_t rows = conv.rows(), row_size = conv.padded_width() * kSmallChannels;
  const int64_t R = conv.R, S = conv.S;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < conv.K; ++k) {
      const int32_t* begin = pixels.begin + k * (rows + 1) + i;
      const A* weight = turned_weight + k * R * S * kSmallChannels;
      for (int32_t p = begin[0]; p < begin[1]; ++p) {
        const A g = load(pixels.gradient[p]);
        A* target = grad + pixels.pixel[p] * kSmallChannels;
        for (int64_t r = 0; r < R; ++r) {
          add_taps<kWidth, kVectors>(target + r * row_size, weight + r * S * kSmallChannels, g, S);
        }
      }
    }
  }
}

template <typename T>
auto add_input_gradient_of(const PooledConv2d& conv) {
  constexpr int kWhole = static_cast<int>(kSmallChannels) / kLanes<accumulate_t<T>>;
  if (conv.C > kLanes<accumulate_t<T>>) return &add_input_gradient<T, 0, kWhole>;
  return conv.S == 3   ? &add_input_gradient<T, 3, 1>
         : conv.S == 5 ? &add_input_gradient<T, 5, 1>
         : conv.S == 7 ? &add_input_gradient<T, 7, 1>
                       : &add_input_gradient<T, 0, 1>;
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
accumulate_t<T> sum_of(const T* values, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  vector_t<A> sums{};
  int64_t i = 0;
  for (; i + L <= count; i += L) sums += load_vector(values + i);
  A sum = sum_lanes<A>(sums);
  for (; i < count; ++i) sum += load(values[i]);
  return sum;
}

template <typename T>
void gradients_of_task(const PooledConv2d& conv, const SmallConv2dGradients& all,
                       accumulate_t<T>* scratch, int64_t task) {
  using A = accumulate_t<T>;
  const int64_t outputs = conv.K * conv.rows() * conv.columns();
  const int64_t inputs = conv.C * conv.H * conv.W;
  // Behind each lies a vector's worth: whole vectors are read and written.
  auto* padded = reinterpret_cast<factor_t<T>*>(scratch);
  A* grad = scratch + conv.padded_pixels() * conv.C + kImageBlock;
  A* gradient = grad + conv.padded_pixels() * kSmallChannels;
  auto* pixel = reinterpret_cast<int32_t*>(gradient + outputs + kImageBlock);
  const Pixels<T> pixels{pixel, reinterpret_cast<factor_t<T>*>(gradient),
                         pixel + outputs + kImageBlock};

  A* weight_sums = static_cast<A*>(all.weight_sums) + task * conv.weight_sums();
  A* bias_sums = static_cast<A*>(all.bias_sums) + task * conv.K;
  if (all.weight_sums) {
    memset(weight_sums, 0, static_cast<size_t>(conv.weight_sums()) * sizeof(A));
  }
  double bias_total[kSmallChannels] = {};
  const WindowOffsets offsets(conv);
  const int64_t end = smaller(conv.N, (task + 1) * PooledConv2d::kGradientImages);
  for (int64_t n = task * PooledConv2d::kGradientImages; n < end; ++n) {
    find_pixels(conv, static_cast<const T*>(all.grad_output) + n * outputs,
                static_cast<const T*>(all.output) + n * outputs,
                all.argmax ? all.argmax + n * outputs : nullptr, offsets, pixels);
    if (all.weight_sums) pad_image(conv, static_cast<const T*>(all.x) + n * inputs, padded);
    for (int64_t k = 0; k < conv.K; ++k) {
      const int64_t first = pixels.begin[k * (conv.rows() + 1)];
      const int64_t count = pixels.begin[k * (conv.rows() + 1) + conv.rows()] - first;
      bias_total[k] += sum_of(pixels.gradient + first, count);
      if (!all.weight_sums) continue;
      add_weight_gradient<T>(conv, padded, pixels.pixel + first, pixels.gradient + first, count,
                             weight_sums + k * conv.R * conv.patch_row());
    }
    if (all.grad_x) {
      memset(grad, 0, static_cast<size_t>(conv.padded_pixels() * kSmallChannels) * sizeof(A));
      add_input_gradient_of<T>(conv)(conv, static_cast<const A*>(all.turned_weight), pixels, grad);
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
                                void* grad_bias, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const int64_t row = conv.patch_row(), size = conv.R * row;
    for (int64_t k = begin; k < end; ++k) {
      double bias = 0;
      double sums[kSmallKernel * kSmallKernel * kSmallChannels + kSmallKernel * kImageBlock] = {};
      for (int64_t task = 0; task < conv.backward_tasks(); ++task) {
        bias += static_cast<const A*>(gradients.bias_sums)[task * conv.K + k];
        if (!grad_weight) continue;
        const A* part =
            static_cast<const A*>(gradients.weight_sums) + task * conv.weight_sums() + k * size;
        for (int64_t i = 0; i < size; ++i) sums[i] += part[i];
      }
      static_cast<T*>(grad_bias)[k] = store<T>(A(bias));
      T* target = static_cast<T*>(grad_weight) + k * conv.C * conv.R * conv.S;
      for (int64_t t = 0; grad_weight && t < conv.R * conv.S; ++t) {
        for (int64_t c = 0; c < conv.C; ++c) {
          target[c * conv.R * conv.S + t] =
              store<T>(A(sums[t / conv.S * row + t % conv.S * conv.C + c]));
        }
      }
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA
