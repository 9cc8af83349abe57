// The gradient of max_pool2d for any part of its input, windows overlapping or not; for kernel code
// only. A pixel's gradients are added in the order of its windows, whatever the part, and as the
// CUDA kernel adds them.
#pragma once

#include "max_pool2d/max_pool2d.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // one copy for each file: see core/isa.h

// Where each position lies from its window's origin, times `channels`. Bytes that are no position
// of a window lead nowhere.
struct Offsets {
  int64_t of[256];

  Offsets(const MaxPool2dParams& p, int64_t channels) {
    for (int k = 0; k < 256; ++k) {
      const int64_t h = k / p.columns.kernel * int64_t{p.rows.dilation};
      const int64_t w = k % p.columns.kernel * int64_t{p.columns.dilation};
      const bool exists = k < p.rows.kernel * p.columns.kernel;
      of[k] = exists ? (h * p.columns.input + w) * channels : int64_t{1} << 62;
    }
  }
};

// sums [end - begin, channels]: the gradients of the pixels [begin, end) of one map, in as many
// channels as the offsets are for. The pointers are at the map's first window and the first of
// those channels; from one window to the next there are `step` elements.
template <typename T>
void unpool_pixels(const T* grad_output, const uint8_t* argmax, const MaxPool2dParams& p,
                   const Offsets& offsets, int64_t step, int64_t channels, int64_t begin,
                   int64_t end, accumulate_t<T>* __restrict sums) {
  const int64_t size = (end - begin) * channels;
  memset(sums, 0, static_cast<size_t>(size) * sizeof(*sums));
  const int first_row = static_cast<int>(begin / p.columns.input);
  const int last_row = static_cast<int>((end - 1) / p.columns.input);
  const int last_window = (last_row + p.rows.padding) / p.rows.stride;
  const int stop = last_window < p.rows.output ? last_window + 1 : p.rows.output;
  for (int oh = windows_over(p.rows, first_row).begin; oh < stop; ++oh) {
    const TapRange taps_h = taps_inside(p.rows, oh);
    const int64_t h = int64_t{oh} * p.rows.stride - p.rows.padding;
    int64_t place = int64_t{oh} * p.columns.output * step;
    for (int ow = 0; ow < p.columns.output; ++ow, place += step) {
      const TapRange taps_w = taps_inside(p.columns, ow);
      if (taps_h.begin >= taps_h.end || taps_w.begin >= taps_w.end) continue;
      const int64_t w = int64_t{ow} * p.columns.stride - p.columns.padding;
      const int64_t origin = (h * p.columns.input + w - begin) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t target = origin + c + offsets.of[argmax[place + c]];
        if (target >= 0 && target < size) sums[target] += load(grad_output[place + c]);
      }
    }
  }
}

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
