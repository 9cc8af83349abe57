// The gradient of max_pool2d_cpu.cpp's op.
#include "max_pool2d/max_pool2d_unpool.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// One thread has all of a map's gradients, and sums them in `scratch` where T is too narrow to.
template <typename T>
void unpool_maps(const T* grad_output, const uint8_t* argmax, T* grad, void* scratch,
                 const MaxPool2dParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t channels = p.channels_last ? p.channels : 1;
  const int64_t pixels = static_cast<int64_t>(p.rows.input) * p.columns.input;
  const int64_t windows = static_cast<int64_t>(p.rows.output) * p.columns.output * channels;
  const Offsets offsets(p, channels);
  for (int64_t map = begin; map < end; ++map) {
    T* __restrict own = grad + map * pixels * channels;
    A* __restrict sums = static_cast<A*>(sizeof(T) == sizeof(A) ? own : scratch);
    unpool_pixels(grad_output + map * windows, argmax + map * windows, p, offsets, channels,
                  channels, 0, pixels, sums);
    if (sizeof(T) == sizeof(A)) continue;
    for (int64_t i = 0; i < pixels * channels; ++i) own[i] = store<T>(sums[i]);
  }
}

// Windows that tile the map share no pixel, so their rows are independent. The last output row
// also has the input rows below it. Bytes that are no position lead to a window's origin.
template <typename T>
void unpool_tiles(const T* grad_output, const uint8_t* argmax, T* grad, const MaxPool2dParams& p,
                  int64_t begin, int64_t end) {
  const int64_t channels = p.channels_last ? p.channels : 1;
  const int64_t row_size = p.columns.input * channels;
  int64_t offsets[256] = {};
  for (int k = 0; k < p.rows.kernel * p.columns.kernel; ++k) {
    offsets[k] = k / p.columns.kernel * row_size + k % p.columns.kernel * channels;
  }
  for (int64_t row = begin; row < end; ++row) {  // (n, output row) or (n, c, output row)
    const int oh = static_cast<int>(row % p.rows.output);
    const int h = oh * p.rows.kernel;
    const int rows = oh + 1 == p.rows.output ? p.rows.input - h : p.rows.kernel;
    T* __restrict out = grad + (row / p.rows.output * p.rows.input + h) * row_size;
    const T* __restrict g = grad_output + row * p.columns.output * channels;
    const uint8_t* __restrict a = argmax + row * p.columns.output * channels;
    memset(out, 0, static_cast<size_t>(rows * row_size) * sizeof(T));
    for (int ow = 0; ow < p.columns.output; ++ow) {
      for (int64_t c = 0; c < channels; ++c) out[c + offsets[a[c]]] = g[c];
      out += p.columns.kernel * channels;
      g += channels;
      a += channels;
    }
  }
}

}  // namespace

void max_pool2d_backward(DType dtype, const void* grad_output, const uint8_t* argmax, void* grad,
                         void* scratch, const MaxPool2dParams& params, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const T* in = static_cast<const T*>(grad_output);
    T* out = static_cast<T*>(grad);
    if (tiles(params)) {
      unpool_tiles(in, argmax, out, params, begin, end);
    } else {
      unpool_maps(in, argmax, out, scratch, params, begin, end);
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"
#include "core/scratch.h"

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
        const int64_t units = pool_maps(params) * (tiles(params) ? params.rows.output : 1);
        parallel_for(units, pool_grain(units, grad), [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(max_pool2d_backward)
          (dtype_of(grad), grad_output.const_data_ptr(),
           static_cast<const uint8_t*>(argmax.const_data_ptr()), grad.mutable_data_ptr(),
           thread_scratch(unpool_scratch(params, grad)), params, begin, end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward_cpu));
}

}  // namespace skinfast
#endif
