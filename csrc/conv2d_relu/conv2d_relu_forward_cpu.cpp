// The forward pass of small convolutions: sixteen images side by side in the lanes.
#include "conv2d_relu/conv2d_relu.h"
#include "core/lanes.h"
#include "core/transpose.h"

namespace skinfast::SKINFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPixels = 2;  // 10 filters x 2 pixels of sums fit 32 registers
#else
constexpr int kPixels = 1;  // and 10 x 1 fit 16
#endif
constexpr int kFilters = static_cast<int>(kFilterBlock);

SKINFAST_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SKINFAST_HOST_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A lane holds kTerms channels of a pixel: one in an accumulator, or two as the bits of a float,
// which are turned over as a float's are.

// sum += weight * value, for each channel of each lane.
template <typename T, typename A = accumulate_t<T>>
SKINFAST_HOST_DEVICE void multiply_add(vector_t<A>& sum, A weight, vector_t<A> value) {
#if defined(__AVX512BF16__)
  if constexpr (kTerms<T> == 2) {
    const auto weights = reinterpret_cast<__m512bh>(_mm512_set1_ps(weight));
    sum = _mm512_dpbf16_ps(sum, weights, reinterpret_cast<__m512bh>(value));
    return;
  }
#endif
  sum += weight * value;
}

// The weight of one channel, or of two that are `taps` apart, the second of which may not be there.
template <typename T>
accumulate_t<T> pack_channels(const T* weight, int64_t taps, bool second) {
  if constexpr (kTerms<T> == 1) {
    return load(*weight);
  } else {
    const uint32_t pair = weight[0].bits | (second ? uint32_t{weight[taps].bits} << 16 : 0);
    accumulate_t<T> bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
  }
}

// Neighbouring pixels, `filled` of them, of one image's channel; or of two channels side by side,
// the second of which is `plane` behind the first, or not there.
template <typename T>
SKINFAST_HOST_DEVICE vector_t<accumulate_t<T>> load_pixels(const T* pixels, int filled,
                                                           int64_t plane, bool second) {
  using A = accumulate_t<T>;
  const auto load_channel = [filled](const T* channel) {
    return filled == kLanes<A> ? load_vector(channel) : load_partial(channel, filled);
  };
  const vector_t<A> low = load_channel(pixels);
  if constexpr (kTerms<T> == 1) {
    return low;
  } else {
    typedef uint32_t Bits __attribute__((vector_size(SKINFAST_VECTOR_BYTES)));
    const vector_t<A> high = second ? load_channel(pixels + plane) : vector_t<A>{};
    return reinterpret_cast<vector_t<A>>(reinterpret_cast<Bits>(low) >> 16 |
                                         reinterpret_cast<Bits>(high));
  }
}

// The rows [first, first + input_rows) of x, counted with the padding, for `count` images:
// x [N, C, H, W] -> band [C / kTerms, input_rows, padded_width, lanes]; missing images and padding
// are zero.
template <typename T>
void turn_images(const PooledConv2d& conv, const T* x, int count, int64_t first,
                 accumulate_t<T>* band) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t rows = conv.input_rows(), width = conv.padded_width();
  const int64_t begin = larger(0, first - conv.pad_h);
  const int64_t end = smaller(conv.H, first - conv.pad_h + rows);
  for (int64_t c = 0; c < conv.C; c += kTerms<T>) {
    A* plane = band + c / kTerms<T> * rows * width * L;
    memset(plane, 0, static_cast<size_t>(rows * width * L) * sizeof(A));
    const T* source = x + (c * conv.H + begin) * conv.W;
    A* target = plane + ((begin + conv.pad_h - first) * width + conv.pad_w) * L;
    const int64_t elements = (end - begin) * conv.W;
    int64_t column = 0;
    for (int64_t e = 0; e < elements; e += L) {
      const int filled = static_cast<int>(smaller(L, elements - e));
      vector_t<A> block[L];
      const T* image = source + e;
      for (int i = 0; i < L; ++i, image += conv.C * conv.H * conv.W) {
        block[i] =
            i < count ? load_pixels(image, filled, conv.H * conv.W, c + 1 < conv.C) : vector_t<A>{};
      }
      transpose<A>(block);
      for (int j = 0; j < filled; ++j) {
        store_vector(target, block[j]);
        target += L;
        if (++column == conv.W) {
          column = 0;
          target += 2 * conv.pad_w * L;
        }
      }
    }
  }
}

// A block of filters at V neighbouring pixels; `origin` is the first tap's pixel in the band.
template <typename T, int V, typename A = accumulate_t<T>>
SKINFAST_HOST_DEVICE void convolve_pixels(const PooledConv2d& conv, const A* origin,
                                          const A* packed, const A* bias,
                                          vector_t<A> (&sum)[kFilters][V]) {
  constexpr int L = kLanes<A>;
  const int64_t width = conv.padded_width(), plane = conv.input_rows() * width;
  for (int k = 0; k < kFilters; ++k) {
    for (int v = 0; v < V; ++v) sum[k][v] = vector_t<A>{} + bias[k];
  }
  for (int64_t c = 0; c < ceil_div(conv.C, kTerms<T>); ++c) {
    for (int64_t r = 0; r < conv.R; ++r) {
      const A* row = origin + (c * plane + r * width) * L;
      for (int64_t s = 0; s < conv.S; ++s) {
        vector_t<A> value[V];
        for (int v = 0; v < V; ++v) value[v] = load_vector(row + (s + v) * L);
        for (int k = 0; k < kFilters; ++k) {
          for (int v = 0; v < V; ++v) multiply_add<T>(sum[k][v], packed[k], value[v]);
        }
        packed += kFilters;
      }
    }
  }
}

// take_maximum() of max_pool2d.h, lane by lane: the first of equals stays, NaN replaces everything.
template <typename A>
SKINFAST_HOST_DEVICE void take_maximum(vector_t<A> value, lane_integers<A> position,
                                       vector_t<A>& maximum, lane_integers<A>& argmax) {
  const lane_integers<A> replaces = (value > maximum) | (value != value);
  maximum = replaces ? value : maximum;
  argmax = replaces ? position : argmax;
}

// As it would be stored: in lower precision values that differ may become equal maxima.
template <typename T, typename A = accumulate_t<T>>
SKINFAST_HOST_DEVICE vector_t<A> rounded(vector_t<A> value) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return value;
  } else {
    T stored[kLanes<A>];
    store_vector(stored, value);
    return load_vector(stored);
  }
}

// The pixels first, ... of those that were computed together, all of one window, in which they are
// the numbers position, ...: into the maxima of all filters, which are `stride` apart.
template <typename T, int kFirst, int kCount, int V, typename A = accumulate_t<T>>
SKINFAST_HOST_DEVICE void pool_pixels(const vector_t<A> (&sum)[kFilters][V], int64_t position,
                                      A* maxima, integer_for<A>* argmax, int64_t stride) {
  const lane_integers<A> at = lane_integers<A>{} + static_cast<integer_for<A>>(position);
  for (int k = 0; k < kFilters; ++k, maxima += stride, argmax += stride) {
    vector_t<A> value = rounded<T>(sum[k][kFirst]);
    lane_integers<A> from = at;
    if constexpr (kCount == 2) take_maximum<A>(rounded<T>(sum[k][kFirst + 1]), at + 1, value, from);
    if (position > 0) {
      vector_t<A> maximum = load_vector(maxima);
      lane_integers<A> positions;
      memcpy(&positions, argmax, sizeof(positions));
      take_maximum<A>(value, from, maximum, positions);
      value = maximum;
      from = positions;
    }
    store_vector(maxima, value);
    memcpy(argmax, &from, sizeof(from));
  }
}

// The row of pixels number `dh` of the windows of one output row.
template <typename T, typename A = accumulate_t<T>>
SKINFAST_HOST_DEVICE void convolve_row(const PooledConv2d& conv, const A* row, const A* packed,
                                       const A* bias, int64_t dh, A* maxima,
                                       integer_for<A>* argmax) {
  constexpr int L = kLanes<A>;
  const int64_t stride = conv.band_rows() * conv.columns() * L;  // from filter to filter
  const int64_t width = conv.window.width, columns = conv.columns();
  int64_t column = 0;
  if (kPixels == 2 && width == 1) {
    for (; column + 2 <= columns; column += 2, row += 2 * L, maxima += 2 * L, argmax += 2 * L) {
      vector_t<A> sum[kFilters][2];
      convolve_pixels<T, 2>(conv, row, packed, bias, sum);
      pool_pixels<T, 0, 1>(sum, dh, maxima, argmax, stride);
      pool_pixels<T, 1, 1>(sum, dh, maxima + L, argmax + L, stride);
    }
  }
  for (; column < columns; ++column, maxima += L, argmax += L) {
    int64_t dw = 0;
    for (; kPixels == 2 && dw + 2 <= width; dw += 2, row += 2 * L) {
      vector_t<A> sum[kFilters][2];
      convolve_pixels<T, 2>(conv, row, packed, bias, sum);
      pool_pixels<T, 0, 2>(sum, dh * width + dw, maxima, argmax, stride);
    }
    for (; dw < width; ++dw, row += L) {
      vector_t<A> sum[kFilters][1];
      convolve_pixels<T, 1>(conv, row, packed, bias, sum);
      pool_pixels<T, 0, 1>(sum, dh * width + dw, maxima, argmax, stride);
    }
  }
}

// Turn `elements` lanes of images back and store them, in each image where `target` says.
template <typename A, typename Store>
SKINFAST_HOST_DEVICE void turn_back(const A* source, int64_t elements, int count,
                                    const Store& store) {
  constexpr int L = kLanes<A>;
  for (int64_t e = 0; e < elements; e += L) {
    vector_t<A> block[L];
    for (int j = 0; j < L; ++j) block[j] = load_vector(source + (e + j) * L);
    transpose<A>(block);
    const int filled = static_cast<int>(smaller(L, elements - e));
    for (int i = 0; i < count; ++i) store(i, e, block[i], filled);
  }
}

template <typename A>
SKINFAST_HOST_DEVICE void store_positions(uint8_t* target, vector_t<A> positions, int count) {
  const auto lanes = reinterpret_cast<lane_integers<A>>(positions);
#if defined(__AVX512F__)  // GCC narrows step by step
  const __m128i bytes = sizeof(A) == 4
                            ? _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(lanes))
                            : _mm512_maskz_cvtepi64_epi8(0xff, reinterpret_cast<__m512i>(lanes));
  if (count == kLanes<A>) {
    memcpy(target, &bytes, kLanes<A>);
    return;
  }
#endif
  for (int i = 0; i < count; ++i) target[i] = static_cast<uint8_t>(lanes[i]);
}

// One block of images (as many as there are lanes), one band of output rows.
template <typename T>
void convolve_band(const PooledConv2d& conv, const T* x, const accumulate_t<T>* packed,
                   const accumulate_t<T>* bias, T* output, uint8_t* argmax, int count,
                   int64_t first_row, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  A* band = scratch;
  A* maxima = band + conv.forward_input();
  A* positions = maxima + conv.forward_output();
  static_assert(sizeof(integer_for<A>) == sizeof(A));
  const int64_t rows = smaller(conv.band_rows(), conv.rows() - first_row);
  const int64_t columns = conv.columns(), map = conv.rows() * columns;
  turn_images(conv, x, count, first_row * conv.window.height, band);
  for (int64_t first = 0; first < conv.K; first += kFilters) {
    const A* block = packed + first * ceil_div(conv.C, kTerms<T>) * conv.R * conv.S;
    const int filters = static_cast<int>(smaller(kFilters, conv.K - first));
    A block_bias[kFilters] = {};
    for (int k = 0; bias && k < filters; ++k) block_bias[k] = bias[first + k];
    for (int64_t i = 0; i < rows; ++i) {
      A* row_maxima = maxima + i * columns * L;
      auto* row_positions = reinterpret_cast<integer_for<A>*>(positions) + i * columns * L;
      for (int64_t dh = 0; dh < conv.window.height; ++dh) {
        const A* row = band + (i * conv.window.height + dh) * conv.padded_width() * L;
        convolve_row<T>(conv, row, block, block_bias, dh, row_maxima, row_positions);
      }
    }
    for (int k = 0; k < filters; ++k) {
      const int64_t at = k * conv.band_rows() * columns * L;
      const int64_t plane = (first + k) * map + first_row * columns;
      turn_back<A>(maxima + at, rows * columns, count,
                   [&](int i, int64_t e, vector_t<A> value, int filled) {
                     // `x < 0 ? 0 : x`, as relu(), so that NaN passes through.
                     value = value < vector_t<A>{} ? vector_t<A>{} : value;
                     T* target = output + i * conv.K * map + plane + e;
                     if (filled == L) {
                       store_vector(target, value);
                     } else {
                       store_partial(target, value, filled);
                     }
                   });
      if (!argmax) continue;
      // Where nothing is above zero the ReLU makes all equal, and the first is the maximum.
      for (int64_t e = at; e < at + rows * columns * L; e += L) {
        const vector_t<A> position = load_vector(positions + e);
        store_vector(positions + e,
                     load_vector(maxima + e) <= vector_t<A>{} ? vector_t<A>{} : position);
      }
      turn_back<A>(positions + at, rows * columns, count,
                   [&](int i, int64_t e, vector_t<A> value, int filled) {
                     store_positions<A>(argmax + i * conv.K * map + plane + e, value, filled);
                   });
    }
  }
}

}  // namespace

void pack_weight(DType dtype, const PooledConv2d& conv, const void* weight, void* packed) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const T* source = static_cast<const T*>(weight);
    A* target = static_cast<A*>(packed);
    const int64_t taps = conv.R * conv.S, groups = ceil_div(conv.C, kTerms<T>);
    memset(packed, 0, static_cast<size_t>(conv.packed_weights()) * sizeof(A));
    for (int64_t k = 0; k < conv.K; ++k) {
      for (int64_t c = 0; c < conv.C; c += kTerms<T>) {
        const T* channel = source + (k * conv.C + c) * taps;
        const int64_t group = k / kFilters * groups + c / kTerms<T>;
        A* first = target + group * taps * kFilters + k % kFilters;
        for (int64_t t = 0; t < taps; ++t) {
          first[t * kFilters] = pack_channels(channel + t, taps, c + 1 < conv.C);
        }
      }
    }
  });
}

void small_conv2d(DType dtype, const PooledConv2d& conv, const void* x, const void* packed,
                  const void* bias, void* output, uint8_t* argmax, void* scratch, int64_t begin,
                  int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    constexpr int L = kLanes<A>;
    const int64_t outputs = conv.K * conv.rows() * conv.columns();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / conv.bands() * kImageBlock;
      const int64_t last = smaller(conv.N, first + kImageBlock);
      for (int64_t n = first; n < last; n += L) {
        convolve_band(conv, static_cast<const T*>(x) + n * conv.C * conv.H * conv.W,
                      static_cast<const A*>(packed), static_cast<const A*>(bias),
                      static_cast<T*>(output) + n * outputs,
                      argmax ? argmax + n * outputs : nullptr,
                      static_cast<int>(smaller(L, last - n)),
                      task % conv.bands() * conv.band_rows(), static_cast<A*>(scratch));
      }
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA
