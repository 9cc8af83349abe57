// The same through CUTLASS's reference on the host, with the problem, the tensors and the output
// operator that the kernels on the GPU are given. Compiled where CUTLASS and the CUDA headers are.
#include <cutlass/layout/matrix.h>
#include <cutlass/util/reference/host/convolution.h>
#include <cutlass/util/reference/host/gemm.h>

#include <vector>

#include "conv2d/conv2d_cutlass_epilogue.h"
#include "conv2d/conv2d_cutlass_problem.h"
#include "stand_in.h"

namespace stand_in {

using namespace skinfast;
using Element = CutlassElement<BFloat16>::type;

void forward(const TensorCoreConv2d& c, const BFloat16* x, const BFloat16* weight,
             const BFloat16* bias, const BFloat16* residual, bool with_relu, BFloat16* output) {
  constexpr int kWidth = static_cast<int>(kTensorCoreChannels);
  std::vector<float> sums(c.output_size());
  cutlass::reference::host::Conv2dFprop<Element, TensorNHWC, Element, TensorNHWC, float, TensorNHWC,
                                        float>(
      problem_of(c), input_ref<Element>(c, x), weight_ref<Element>(c, weight),
      output_ref<float>(c, sums.data()), output_ref<float>(c, sums.data()), 1.0f, 0.0f);
  using Epilogue = BiasResidualReLU<Element, kWidth>;
  const Epilogue epilogue({residual != nullptr, with_relu});
  for (int64_t i = 0; i < c.output_size(); i += kWidth) {
    Epilogue::FragmentOutput result, unused, source;
    Epilogue::FragmentCompute sum, vector;
    for (int j = 0; j < kWidth; ++j) {
      sum[j] = sums[i + j];
      vector[j] = bias ? load(bias[(i + j) % c.K]) : 0.0f;
      if (residual) source[j] = Element::bitcast(residual[i + j].bits);
    }
    if (epilogue.is_source_needed()) {
      epilogue(result, unused, sum, source, vector);
    } else {
      epilogue(result, unused, sum, vector);
    }
    for (int j = 0; j < kWidth; ++j) output[i + j].bits = Element(result[j]).raw();
  }
}

void product(const PointwiseProduct& p, const BFloat16* left, const BFloat16* right, bool forward,
             const BFloat16* bias, const BFloat16* residual, bool with_relu, BFloat16* output) {
  using cutlass::layout::ColumnMajor;
  using cutlass::layout::RowMajor;
  const auto multiply = [&]<typename RightLayout>(RightLayout layout) {
    const auto extent = [](int64_t size) { return static_cast<int>(size); };
    const auto matrix = []<typename T, typename Layout>(const void* data, T, Layout layout) {
      return cutlass::TensorRef<T, Layout>(static_cast<T*>(const_cast<void*>(data)), layout);
    };
    std::vector<float> sums(p.rows * p.columns);
    const auto result = matrix(sums.data(), float{}, RowMajor(p.columns));
    cutlass::reference::host::compute_gemm({extent(p.rows), extent(p.columns), extent(p.depth)},
                                           1.0f, matrix(left, Element{}, RowMajor(p.depth)),
                                           matrix(right, Element{}, layout), 0.0f, result, result,
                                           0.0f);
    for (int64_t i = 0; i < p.rows * p.columns; ++i) {
      cutlass::Array<float, 1> value;
      value[0] = sums[i] + (bias ? load(bias[i % p.columns]) : 0.0f);
      if (residual) value[0] += load(residual[i]);
      output[i] = store<BFloat16>(OptionalReLU<decltype(value)>()(value, {with_relu})[0]);
    }
  };
  forward ? multiply(ColumnMajor(p.depth)) : multiply(RowMajor(p.columns));
}

void input_gradient(const TensorCoreConv2d& c, const BFloat16* grad_output, const BFloat16* weight,
                    BFloat16* grad_x) {
  cutlass::reference::host::Conv2dDgrad<Element, TensorNHWC, Element, TensorNHWC, Element,
                                        TensorNHWC, float>(
      problem_of(c), output_ref<Element>(c, grad_output), weight_ref<Element>(c, weight),
      input_ref<Element>(c, grad_x), input_ref<Element>(c, grad_x), 1.0f, 0.0f);
}

// The reference knows no slices: the rows of the others are given no gradient.
void weight_gradient(const TensorCoreConv2d& c, const BFloat16* grad_output, const BFloat16* x,
                     float* grad_weight, int64_t begin, int64_t end) {
  std::vector<BFloat16> of_slice(c.output_size(), BFloat16{0});
  std::copy(grad_output + begin * c.K, grad_output + end * c.K, of_slice.begin() + begin * c.K);
  cutlass::reference::host::Conv2dWgrad<Element, TensorNHWC, Element, TensorNHWC, float, TensorNHWC,
                                        float>(
      problem_of(c), output_ref<Element>(c, of_slice.data()), input_ref<Element>(c, x),
      weight_ref<float>(c, grad_weight), weight_ref<float>(c, grad_weight), 1.0f, 0.0f);
}

}  // namespace stand_in
