// A convolution in CUTLASS's words: element types, tensors, the problem. Compiles without nvcc.
#pragma once

#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/layout/tensor.h>
#include <cutlass/numeric_types.h>
#include <cutlass/tensor_ref.h>

#include "conv2d/conv2d_tensor_core.h"

namespace skinfast {

namespace conv = cutlass::conv;

template <typename T>
struct CutlassElement;
template <>
struct CutlassElement<BFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct CutlassElement<Half> {
  using type = cutlass::half_t;
};

using cutlass::layout::TensorNHWC;

// A dense tensor [a, b, c, d] with d innermost. CUTLASS has no references to const outputs.
template <typename Element>
cutlass::TensorRef<Element, TensorNHWC> tensor_ref(const void* data, int64_t a, int64_t b,
                                                   int64_t c, int64_t d) {
  const auto extent = [](int64_t size) { return static_cast<int>(size); };
  return {static_cast<Element*>(const_cast<void*>(data)),
          TensorNHWC::packed({extent(a), extent(b), extent(c), extent(d)})};
}
template <typename Element>
auto input_ref(const TensorCoreConv2d& c, const void* data) {
  return tensor_ref<Element>(data, c.N, c.H, c.W, c.C);
}
template <typename Element>
auto weight_ref(const TensorCoreConv2d& c, const void* data) {
  return tensor_ref<Element>(data, c.K, c.R, c.S, c.C);
}
template <typename Element>
auto output_ref(const TensorCoreConv2d& c, const void* data) {
  return tensor_ref<Element>(data, c.N, c.P, c.Q, c.K);
}

inline conv::Conv2dProblemSize problem_of(const TensorCoreConv2d& c, int64_t slices = 1) {
  const auto extent = [](int64_t size) { return static_cast<int>(size); };
  return {extent(c.N),
          extent(c.H),
          extent(c.W),
          extent(c.C),
          extent(c.K),
          extent(c.R),
          extent(c.S),
          extent(c.P),
          extent(c.Q),
          extent(c.pad_h),
          extent(c.pad_w),
          extent(c.stride_h),
          extent(c.stride_w),
          1,
          1,
          conv::Mode::kCrossCorrelation,  // as PyTorch: the kernel is not turned
          extent(slices)};
}

}  // namespace skinfast
