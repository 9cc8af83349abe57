// Which pixels of a small convolution's output have a gradient. Included inside CPU kernel files
// only, like core/vector.h.
#pragma once

#include <type_traits>

#include "conv2d_relu/conv2d_relu.h"
#include "core/vector.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // a copy for each file: no symbol that the linker could share

// What gradients and images are kept in for the sums of the weights: as they were stored where two
// products are added at once, else in accumulators.
template <typename T>
using factor_t = std::conditional_t<kTerms<T> == 2, T, accumulate_t<T>>;

template <typename T>
SKINFAST_HOST_DEVICE factor_t<T> factor(T value) {
  if constexpr (kTerms<T> == 2) {
    return value;
  } else {
    return load(value);
  }
}

// The pixels of one image that have a gradient, filter by filter and row by row of the output:
// pixel is the first tap's, in the padded map; those of filter k, row i are the numbers
// [begin[k * (rows + 1) + i], begin[k * (rows + 1) + i + 1]).
template <typename T>
struct Pixels {
  int32_t* pixel;
  factor_t<T>* gradient;
  int32_t* begin;
};

// From the first pixel of a window to its pixel number a. Bytes that no forward pass writes lead to
// 0.
struct WindowOffsets {
  int32_t of[256] = {};

  explicit WindowOffsets(const PooledConv2d& conv) {
    for (int64_t a = 0; a < conv.window.size(); ++a) {
      of[a] =
          static_cast<int32_t>(a / conv.window.width * conv.padded_width() + a % conv.window.width);
    }
  }
};

// Adds one row's pixels to the `count` before; the first window is at `origin`.
template <typename T>
int32_t find_pixels_of_row(const T* grad_output, const T* output, const uint8_t* argmax,
                           int64_t columns, int32_t origin, int32_t window_width,
                           const WindowOffsets& offsets, const Pixels<T>& pixels, int32_t count) {
  for (int64_t j = 0; j < columns; ++j, origin += window_width) {
    pixels.pixel[count] = origin + (argmax ? offsets.of[argmax[j]] : 0);
    pixels.gradient[count] = factor(grad_output[j]);
    count += relu_passes(load(output[j]));
  }
  return count;
}

#if defined(__AVX512F__)
SKINFAST_HOST_DEVICE __m512 load_masked(const float* source, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, source);
}
SKINFAST_HOST_DEVICE __m512 load_masked(const BFloat16* source, __mmask16 lanes) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(lanes, source));
  return reinterpret_cast<__m512>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}

// The lanes that `lanes` names, side by side. What came from bfloat16 keeps its bits: a conversion
// would take numbers below the normal ones for zero.
SKINFAST_HOST_DEVICE void store_compressed(float* target, __mmask16 lanes, __m512 values) {
  _mm512_storeu_ps(target, _mm512_maskz_compress_ps(lanes, values));
}
SKINFAST_HOST_DEVICE void store_compressed(BFloat16* target, __mmask16 lanes, __m512 values) {
  const __m512i bits = reinterpret_cast<__m512i>(_mm512_maskz_compress_ps(lanes, values));
  const __m512i upper = _mm512_maskz_srli_epi32(0xffff, bits, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_maskz_cvtepi32_epi16(0xffff, upper));
}

// The same sixteen at a time, for windows of sixteen pixels at most.
template <typename T>
int32_t find_pixels_of_row_in_lanes(const T* grad_output, const T* output, const uint8_t* argmax,
                                    int64_t columns, int32_t origin, int32_t window_width,
                                    const WindowOffsets& offsets, const Pixels<T>& pixels,
                                    int32_t count) {
  const __m512i table = _mm512_loadu_si512(offsets.of);
  const __m512i step = _mm512_set1_epi32(window_width);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t j = 0; j < columns; j += 16) {
    const auto lanes = static_cast<__mmask16>(columns - j < 16 ? (1 << (columns - j)) - 1 : 0xffff);
    const __m512i column = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(j)));
    __m512i pixel = _mm512_add_epi32(_mm512_mullo_epi32(column, step), _mm512_set1_epi32(origin));
    if (argmax) {
      const __m512i position =
          _mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(lanes, argmax + j));
      pixel = _mm512_add_epi32(pixel, _mm512_maskz_permutexvar_epi32(0xffff, position, table));
    }
    // Not `less or equal` zero: NaN passes, as in relu_passes().
    const __mmask16 passes = _mm512_mask_cmp_ps_mask(lanes, load_masked(output + j, lanes),
                                                     _mm512_setzero_ps(), _CMP_NLE_UQ);
    _mm512_storeu_si512(pixels.pixel + count, _mm512_maskz_compress_epi32(passes, pixel));
    store_compressed(pixels.gradient + count, passes, load_masked(grad_output + j, lanes));
    count += __builtin_popcount(passes);
  }
  return count;
}
#endif

template <typename T>
void find_pixels(const PooledConv2d& conv, const T* grad_output, const T* output,
                 const uint8_t* argmax, const WindowOffsets& offsets, const Pixels<T>& pixels) {
  const int64_t rows = conv.rows(), columns = conv.columns();
  const auto window_width = static_cast<int32_t>(conv.window.width);
  int32_t count = 0;
  for (int64_t k = 0; k < conv.K; ++k) {
    for (int64_t i = 0; i < rows; ++i) {
      pixels.begin[k * (rows + 1) + i] = count;
      const auto origin = static_cast<int32_t>(i * conv.window.height * conv.padded_width());
      const int64_t row = (k * rows + i) * columns;
      const uint8_t* positions = argmax ? argmax + row : nullptr;
#if defined(__AVX512F__)
      if constexpr (!std::is_same_v<T, double>) {
        if (conv.window.size() <= 16) {
          count = find_pixels_of_row_in_lanes(grad_output + row, output + row, positions, columns,
                                              origin, window_width, offsets, pixels, count);
          continue;
        }
      }
#endif
      count = find_pixels_of_row(grad_output + row, output + row, positions, columns, origin,
                                 window_width, offsets, pixels, count);
    }
    pixels.begin[k * (rows + 1) + rows] = count;
  }
}

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
