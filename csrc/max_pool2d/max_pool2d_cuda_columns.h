// max_pool2d in contiguous layout by 16-byte accesses, for the windows that models have: a thread
// takes as many neighbouring windows of a row as a vector has elements, and their input columns,
// which are whole vectors. Results are those of the kernels for any window, to the bit.
#pragma once

#include <limits>

#include "core/cuda.h"
#include "max_pool2d/max_pool2d.h"

namespace skinfast {

// A window of equal height and width, in constants. It may reach beyond its stride to the left
// alone: the kStride * count columns from a window's on hold the right ends of `count` windows.
template <int kKernel_, int kStride_, int kPadding_>
struct FixedWindow {
  static constexpr int kKernel = kKernel_, kStride = kStride_, kPadding = kPadding_;
  static_assert(kKernel <= kStride + kPadding && kPadding <= kStride);

  static bool is_of(const PoolAxis& axis) {
    return axis.kernel == kKernel && axis.stride == kStride && axis.padding == kPadding &&
           axis.dilation == 1;
  }
};

// The windows of a thread, and the columns that no other thread owns.
template <typename T, typename Window>
struct WindowRun {
  static constexpr int kWindows = kVectorWidth<T>;
  static constexpr int kColumns = kWindows * Window::kStride;
  int64_t row, plane;  // the row among those of all planes
  int plane_row, window, column;

  // `runs` to each of the `rows` of a plane.
  __device__ __forceinline__ static WindowRun at(int64_t index, int rows, int runs) {
    const uint32_t i = static_cast<uint32_t>(index);
    const uint32_t row = i / static_cast<uint32_t>(runs);
    const int window = static_cast<int>(i % static_cast<uint32_t>(runs)) * kWindows;
    return {row, row / static_cast<uint32_t>(rows),
            static_cast<int>(row % static_cast<uint32_t>(rows)), window, window * Window::kStride};
  }
};

template <typename T, typename Window>
__global__ void __launch_bounds__(kThreads)
    max_pool2d_columns_kernel(const T* __restrict__ x, T* __restrict__ output,
                              uint8_t* __restrict__ argmax, MaxPool2dParams p, int runs,
                              int64_t count) {
  using A = accumulate_t<T>;
  using Run = WindowRun<T, Window>;
  constexpr int kWidth = kVectorWidth<T>, kLeft = Window::kPadding;
  const int width = p.columns.input;
  const bool wide = p.columns.output % kWidth == 0;  // so the windows' rows are aligned
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Run run = Run::at(i, p.rows.output, runs);
    const TapRange taps_h = taps_inside(p.rows, run.plane_row);
    A maximum[kWidth];
    int position[kWidth];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      maximum[w] = minus_infinity<A>();
      position[w] = taps_h.begin * Window::kKernel + taps_inside(p.columns, run.window + w).begin;
    }
    for (int kh = taps_h.begin; kh < taps_h.end; ++kh) {
      const int h = run.plane_row * Window::kStride - kLeft + kh;
      const T* row = x + (run.plane * p.rows.input + h) * width;
      // Beyond the row lies minus infinity, which replaces nothing.
      A values[kLeft + Run::kColumns];
#pragma unroll
      for (int v = 0; v < kLeft; ++v) {
        const int column = run.column - kLeft + v;
        values[v] = column >= 0 && column < width ? load(row[column]) : minus_infinity<A>();
      }
#pragma unroll
      for (int v = 0; v < Run::kColumns; v += kWidth) {
        const bool inside = run.column + v < width;
        Vector<T, kWidth> in{};
        if (inside) in = *reinterpret_cast<const Vector<T, kWidth>*>(row + run.column + v);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          values[kLeft + v + k] = inside ? load(in.values[k]) : minus_infinity<A>();
        }
      }
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
#pragma unroll
        for (int kw = 0; kw < Window::kKernel; ++kw) {
          take_maximum(values[w * Window::kStride + kw], kh * Window::kKernel + kw, maximum[w],
                       position[w]);
        }
      }
    }
    const int64_t first = run.row * p.columns.output + run.window;
    Vector<T, kWidth> out;
    Vector<uint8_t, kWidth> positions;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      out.values[w] = store<T>(maximum[w]);
      positions.values[w] = static_cast<uint8_t>(position[w]);
    }
    if (wide) {
      *reinterpret_cast<Vector<T, kWidth>*>(output + first) = out;
      *reinterpret_cast<Vector<uint8_t, kWidth>*>(argmax + first) = positions;
    } else {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        if (run.window + w >= p.columns.output) continue;
        output[first + w] = out.values[w];
        argmax[first + w] = positions.values[w];
      }
    }
  }
}

// A thread writes its columns of one row; the windows over them are its own and, where windows
// overlap, the first of its right neighbour's.
template <typename T, typename Window>
__global__ void __launch_bounds__(kThreads)
    max_pool2d_columns_backward_kernel(const T* __restrict__ grad_output,
                                       const uint8_t* __restrict__ argmax, T* __restrict__ grad,
                                       MaxPool2dParams p, int runs, int64_t count) {
  using A = accumulate_t<T>;
  using Run = WindowRun<T, Window>;
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kOver = kWidth + (Window::kPadding > 0 ? 1 : 0);
  const bool wide = p.columns.output % kWidth == 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Run run = Run::at(i, p.rows.input, runs);
    const TapRange over = windows_over(p.rows, run.plane_row);
    A sum[Run::kColumns] = {};
    for (int oh = over.begin; oh < over.end; ++oh) {
      const int kh = run.plane_row + Window::kPadding - oh * Window::kStride;
      const int64_t first = (run.plane * p.rows.output + oh) * p.columns.output + run.window;
      T above[kOver];
      int position[kOver];  // in row kh of the window; beyond it where the maximum is in another
      const auto take = [&](int w, T value, uint8_t taken) {
        above[w] = value;
        position[w] = taken - kh * Window::kKernel;
      };
      const auto take_or_none = [&](int w) {
        above[w] = T{};
        position[w] = -1;
        if (run.window + w < p.columns.output) take(w, grad_output[first + w], argmax[first + w]);
      };
      if (wide && run.window < p.columns.output) {
        const auto g = *reinterpret_cast<const Vector<T, kWidth>*>(grad_output + first);
        const auto a = *reinterpret_cast<const Vector<uint8_t, kWidth>*>(argmax + first);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) take(w, g.values[w], a.values[w]);
      } else {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) take_or_none(w);
      }
      if constexpr (kOver > kWidth) take_or_none(kWidth);
#pragma unroll
      for (int w = 0; w < kOver; ++w) {
#pragma unroll
        for (int kw = 0; kw < Window::kKernel; ++kw) {
          const int column = w * Window::kStride - Window::kPadding + kw;
          if (column < 0 || column >= Run::kColumns) continue;
          if (position[w] == kw) sum[column] += load(above[w]);
        }
      }
    }
    T* row = grad + run.row * p.columns.input + run.column;
#pragma unroll
    for (int v = 0; v < Run::kColumns; v += kWidth) {
      if (run.column + v >= p.columns.input) break;
      Vector<T, kWidth> out;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out.values[k] = store<T>(sum[v + k]);
      *reinterpret_cast<Vector<T, kWidth>*>(row + v) = out;
    }
  }
}

// Calls call(window, runs, count) if one of the windows is the pool's, and memory allows it; else
// returns false. `backward`: the runs are to cover the input.
template <typename T, typename Call, typename... Windows>
bool choose_window(const MaxPool2dParams& p, bool backward, bool aligned, const Call& call,
                   Windows... windows) {
  if (p.channels_last || !aligned || p.columns.input % kVectorWidth<T> != 0) return false;
  const auto chosen = [&](auto window) {
    using Run = WindowRun<T, decltype(window)>;
    if (!window.is_of(p.rows) || !window.is_of(p.columns)) return false;
    const int runs = backward ? (p.columns.input - 1) / Run::kColumns + 1
                              : (p.columns.output - 1) / Run::kWindows + 1;
    const int64_t count = p.batch * p.channels * (backward ? p.rows.input : p.rows.output) * runs;
    if (count > std::numeric_limits<uint32_t>::max()) return false;
    call(window, runs, count);
    return true;
  };
  return (... || chosen(windows));
}

// Those of the CNN's pools and of ResNet's.
template <typename T, typename Call>
bool choose_window(const MaxPool2dParams& p, bool backward, bool aligned, const Call& call) {
  return choose_window<T>(p, backward, aligned, call, FixedWindow<2, 2, 0>{},
                          FixedWindow<3, 3, 0>{}, FixedWindow<4, 4, 0>{}, FixedWindow<3, 2, 1>{});
}

}  // namespace skinfast
