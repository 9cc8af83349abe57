#include <cutlass/conv/kernel/default_conv2d_dgrad.h>

#include "conv2d/conv2d_cutlass_kernels.h"

namespace skinfast {
namespace {

template <typename Kernel>
__global__ void conv2d_input_gradient_kernel(typename Kernel::Params params) {
  run_cutlass<Kernel>(params);
}

template <typename T, typename Tile, conv::StrideSupport kStride, typename Swizzle>
void launch_input_gradient(const TensorCoreConv2d& c, const void* grad_output, const void* weight,
                           void* grad_x, cudaStream_t stream) {
  using Element = typename CutlassElement<T>::type;
  using Epilogue =
      cutlass::epilogue::thread::LinearCombination<Element, static_cast<int>(kTensorCoreChannels),
                                                   float, float>;
  using Kernel = typename conv::kernel::DefaultConv2dDgrad<
      Element, TensorNHWC, Element, TensorNHWC, Element, TensorNHWC, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, typename Tile::Block,
      typename Tile::Warp, typename Tile::Instruction, Epilogue, Swizzle, Tile::kStages,
      cutlass::arch::OpMultiplyAdd, conv::IteratorAlgorithm::kOptimized, kStride>::Kernel;
  launch_cutlass<Kernel>(conv2d_input_gradient_kernel<Kernel>,
                         {problem_of(c),
                          output_ref<Element>(c, grad_output),
                          weight_ref<Element>(c, weight),
                          input_ref<Element>(c, grad_x),
                          input_ref<Element>(c, grad_x),
                          {1.0f, 0.0f},
                          conv::SplitKMode::kSerial},
                         stream);
}

}  // namespace

void cutlass_conv2d_input_gradient(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& c,
                                   const void* grad_output, const void* weight, void* grad_x,
                                   cudaStream_t stream) {
#ifdef SKINFAST_CUTLASS_SM90
  if (facts_of(kernel).is_persistent) {
    return persistent_conv2d_input_gradient(kernel, c, grad_output, weight, grad_x, stream);
  }
#endif
  dispatch_tile(kernel, dtype, [&]<typename T, typename Tile>() {
    if (c.is_strided()) {
      launch_input_gradient<T, Tile, conv::StrideSupport::kStrided,
                            conv::threadblock::StridedDgradIdentityThreadblockSwizzle<1>>(
          c, grad_output, weight, grad_x, stream);
    } else {
      launch_input_gradient<T, Tile, conv::StrideSupport::kUnity,
                            threadblock::GemmIdentityThreadblockSwizzle<1>>(c, grad_output, weight,
                                                                            grad_x, stream);
    }
  });
}

}  // namespace skinfast
