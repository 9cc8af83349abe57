// The gradient of max_pool2d_cpu.cpp's op.
#include "max_pool2d/max_pool2d.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// Where each position lies from its window's origin. Bytes that no forward pass writes lead to 0.
struct Offsets {
  int64_t of[256] = {};

  Offsets(const MaxPool2dParams& p, int64_t channels) {
    for (int k = 0; k < p.rows.kernel * p.columns.kernel; ++k) {
      const int64_t h = k / p.columns.kernel * int64_t{p.rows.dilation};
      const int64_t w = k % p.columns.kernel * int64_t{p.columns.dilation};
      of[k] = (h * p.columns.input + w) * channels;
    }
  }
};

// One thread adds all of a map's gradients, window by window: the order in which the CUDA kernel
// gathers them for each pixel. An argmax that names a pixel outside the map is left out.
template <typename T>
void unpool_maps(const T* grad_output, const uint8_t* argmax, T* grad, accumulate_t<T>* sums,
                 const MaxPool2dParams& p, int64_t begin, int64_t end) {
  const int64_t channels = p.channels_last ? p.channels : 1;
  const int64_t size = static_cast<int64_t>(p.rows.input) * p.columns.input * channels;
  const Offsets offsets(p, channels);
  for (int64_t map = begin; map < end; ++map) {
    accumulate_t<T>* __restrict sum = sums + map * size;
    memset(sum, 0, static_cast<size_t>(size) * sizeof(*sum));
    int64_t place = map * p.rows.output * p.columns.output * channels;
    for (int oh = 0; oh < p.rows.output; ++oh) {
      const TapRange taps_h = taps_inside(p.rows, oh);
      const int64_t h = oh * p.rows.stride - p.rows.padding;
      for (int ow = 0; ow < p.columns.output; ++ow, place += channels) {
        const TapRange taps_w = taps_inside(p.columns, ow);
        if (taps_h.begin >= taps_h.end || taps_w.begin >= taps_w.end) continue;
        const int64_t w = ow * p.columns.stride - p.columns.padding;
        const int64_t origin = (h * p.columns.input + w) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t target = origin + c + offsets.of[argmax[place + c]];
          if (target >= 0 && target < size) sum[target] += load(grad_output[place + c]);
        }
      }
    }
    if (sizeof(T) != sizeof(*sum)) {  // else the sums are the gradient
      for (int64_t i = 0; i < size; ++i) grad[map * size + i] = store<T>(sum[i]);
    }
  }
}

// Windows that tile the map share no pixel, so their rows are independent. The last output row
// also has the input rows below it.
template <typename T>
void unpool_tiles(const T* grad_output, const uint8_t* argmax, T* grad, const MaxPool2dParams& p,
                  int64_t begin, int64_t end) {
  const int64_t channels = p.channels_last ? p.channels : 1;
  const int64_t row_size = p.columns.input * channels;
  const Offsets offsets(p, channels);
  for (int64_t row = begin; row < end; ++row) {  // (n, output row) or (n, c, output row)
    const int oh = static_cast<int>(row % p.rows.output);
    const int h = oh * p.rows.kernel;
    const int rows = oh + 1 == p.rows.output ? p.rows.input - h : p.rows.kernel;
    T* __restrict out = grad + (row / p.rows.output * p.rows.input + h) * row_size;
    const T* __restrict g = grad_output + row * p.columns.output * channels;
    const uint8_t* __restrict a = argmax + row * p.columns.output * channels;
    memset(out, 0, static_cast<size_t>(rows * row_size) * sizeof(T));
    for (int ow = 0; ow < p.columns.output; ++ow) {
      for (int64_t c = 0; c < channels; ++c) out[c + offsets.of[a[c]]] = g[c];
      out += p.columns.kernel * channels;
      g += channels;
      a += channels;
    }
  }
}

}  // namespace

void max_pool2d_backward(DType dtype, const void* grad_output, const uint8_t* argmax, void* grad,
                         void* sums, const MaxPool2dParams& params, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const T* in = static_cast<const T*>(grad_output);
    T* out = static_cast<T*>(grad);
    if (tiles(params)) {
      unpool_tiles(in, argmax, out, params, begin, end);
    } else {
      unpool_maps(in, argmax, out, static_cast<accumulate_t<T>*>(sums), params, begin, end);
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

Tensor max_pool2d_backward_cpu(const Tensor& grad_output, const Tensor& argmax,
                               const std::vector<int64_t>& input_size, const IntPair& kernel_size,
                               const IntPair& stride, const IntPair& padding,
                               const IntPair& dilation, bool ceil_mode, bool channels_last) {
  return max_pool2d_backward_host(
      grad_output, argmax, input_size, kernel_size, stride, padding, dilation, ceil_mode,
      channels_last,
      [](const Tensor& grad_output, const Tensor& argmax, const Tensor& grad,
         const MaxPool2dParams& params) {
        // Where windows overlap, bfloat16 gradients are summed in float32.
        const bool in_float = !tiles(params) && dtype_of(grad) == DType::kBFloat16;
        const Tensor sums =
            in_float ? empty_in(grad, shape_of(grad), MemoryFormat::Contiguous, ScalarType::Float)
                     : grad;
        const int64_t units = pool_maps(params) * (tiles(params) ? params.rows.output : 1);
        parallel_for(units, pool_grain(units, grad), [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(max_pool2d_backward)
          (dtype_of(grad), grad_output.const_data_ptr(),
           static_cast<const uint8_t*>(argmax.const_data_ptr()), grad.mutable_data_ptr(),
           sums.mutable_data_ptr(), params, begin, end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward_cpu));
}

}  // namespace skinfast
#endif
