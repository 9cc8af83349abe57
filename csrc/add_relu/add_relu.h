// output = relu(x + residual): the tail of a residual block (paper, equation 8).
#pragma once

#include "core/isa.h"
#include "core/relu.h"
#include "core/scalar.h"

namespace skinfast {

// The sum is rounded to T once, after the ReLU: the same value as rounding before it, since
// rounding keeps order and zero.
template <typename T>
SKINFAST_HOST_DEVICE T add_relu_value(T x, T residual) {
  return store<T>(relu(load(x) + load(residual)));
}

// CPU kernels, on the elements [begin, end).
SKINFAST_DECLARE_KERNEL(void add_relu(DType dtype, const void* x, const void* residual,
                                      void* output, int64_t begin, int64_t end))
SKINFAST_DECLARE_KERNEL(void add_relu_backward(DType dtype, const void* output,
                                               const void* grad_output, void* grad, int64_t begin,
                                               int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "core/tensor.h"

namespace skinfast {

// Both ops take two tensors of one shape and dtype and make a third: first, second, result [*].
// The result is laid out as the first; `launch(first, second, result)` sees dense tensors of that
// layout that are not empty.
template <typename Launch>
Tensor add_relu_host(const char* op, const char* first_name, const Tensor& first,
                     const char* second_name, const Tensor& second, const Launch& launch) {
  check_floating(op, first_name, first);
  check_same_device(op, second_name, second, first_name, first);
  check_same_dtype(op, second_name, second, first_name, first);
  check_shape(op, second_name, second, shape_of(first));

  const MemoryFormat layout = layout_of(first);
  Tensor result = empty_in(first, shape_of(first), layout);
  if (first.numel() > 0) launch(dense(first, layout), dense(second, layout), result);
  return result;
}

}  // namespace skinfast
#endif
