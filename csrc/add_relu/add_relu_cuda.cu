#include "add_relu/add_relu.h"
#include "core/cuda.h"

namespace skinfast {
namespace {

// result[i] = value(first[i], second[i]) in a grid-stride loop, kWidth elements an access.
template <typename T, int kWidth, typename Value>
__device__ __forceinline__ void elementwise(const T* __restrict__ first,
                                            const T* __restrict__ second, T* __restrict__ result,
                                            int64_t count, Value value) {
  using V = Vector<T, kWidth>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t vectors = count / kWidth;
  for (int64_t i = thread; i < vectors; i += stride) {
    const V a = reinterpret_cast<const V*>(first)[i];
    const V b = reinterpret_cast<const V*>(second)[i];
    V c;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) c.values[k] = value(a.values[k], b.values[k]);
    reinterpret_cast<V*>(result)[i] = c;
  }
  for (int64_t i = vectors * kWidth + thread; i < count; i += stride) {
    result[i] = value(first[i], second[i]);
  }
}

template <typename T, int kWidth>
__global__ void add_relu_kernel(const T* x, const T* residual, T* output, int64_t count) {
  elementwise<T, kWidth>(x, residual, output, count, [](T a, T b) { return add_relu_value(a, b); });
}

template <typename T, int kWidth>
__global__ void add_relu_backward_kernel(const T* output, const T* grad_output, T* grad,
                                         int64_t count) {
  elementwise<T, kWidth>(output, grad_output, grad, count,
                         [](T y, T g) { return relu_gradient(g, y); });
}

// The wide kernel where all three pointers allow 16-byte accesses, else the narrow one.
template <typename T, typename Kernel>
void launch_elementwise(Kernel wide, Kernel narrow, const Tensor& first, const Tensor& second,
                        const Tensor& result) {
  const T* a = static_cast<const T*>(first.const_data_ptr());
  const T* b = static_cast<const T*>(second.const_data_ptr());
  T* c = static_cast<T*>(result.mutable_data_ptr());
  const int64_t count = first.numel();
  const bool aligned = is_aligned(a, b, c);
  launch(aligned ? wide : narrow, grid_for(aligned ? count / kVectorWidth<T> : count), kThreads, 0,
         current_stream(first), a, b, c, count);
}

Tensor add_relu_cuda(const Tensor& x, const Tensor& residual) {
  return add_relu_host("add_relu", "x", x, "residual", residual,
                       [](const Tensor& x, const Tensor& residual, const Tensor& output) {
                         const DeviceGuard guard(x.get_device_index());
                         SKINFAST_CUDA_DISPATCH(dtype_of(x), T, {
                           launch_elementwise<T>(&add_relu_kernel<T, kVectorWidth<T>>,
                                                 &add_relu_kernel<T, 1>, x, residual, output);
                         });
                       });
}

Tensor add_relu_backward_cuda(const Tensor& grad_output, const Tensor& output) {
  return add_relu_host("add_relu_backward", "output", output, "grad_output", grad_output,
                       [](const Tensor& output, const Tensor& grad_output, const Tensor& grad) {
                         const DeviceGuard guard(output.get_device_index());
                         SKINFAST_CUDA_DISPATCH(dtype_of(output), T, {
                           launch_elementwise<T>(&add_relu_backward_kernel<T, kVectorWidth<T>>,
                                                 &add_relu_backward_kernel<T, 1>, output,
                                                 grad_output, grad);
                         });
                       });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) {
  m.impl("add_relu", TORCH_BOX(&add_relu_cuda));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward_cuda));
}

}  // namespace skinfast
