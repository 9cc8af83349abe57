#include <cutlass/conv/kernel/default_conv2d_wgrad.h>

#include "conv2d/conv2d_cutlass_kernels.h"

namespace skinfast {
namespace {

template <typename Kernel>
__global__ void conv2d_weight_gradient_kernel(typename Kernel::Params params) {
  run_cutlass<Kernel>(params);
}

}  // namespace

void cutlass_conv2d_weight_gradient(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& c,
                                    const void* grad_output, const void* x, float* partial,
                                    int64_t slices, cudaStream_t stream) {
#ifdef SKINFAST_CUTLASS_SM90
  if (facts_of(kernel).is_persistent) {
    return persistent_conv2d_weight_gradient(kernel, c, grad_output, x, partial, slices, stream);
  }
#endif
  dispatch_tile(kernel, dtype, [&]<typename T, typename Tile>() {
    using Element = typename CutlassElement<T>::type;
    using Epilogue = cutlass::epilogue::thread::LinearCombination<float, 4, float, float>;
    using Kernel = typename conv::kernel::DefaultConv2dWgrad<
        Element, TensorNHWC, Element, TensorNHWC, float, TensorNHWC, float,
        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, typename Tile::Block,
        typename Tile::Warp, typename Tile::Instruction, Epilogue,
        threadblock::GemmIdentityThreadblockSwizzle<1>, Tile::kStages, cutlass::arch::OpMultiplyAdd,
        conv::IteratorAlgorithm::kOptimized>::Kernel;
    // Parallel: slice i is written to partial + i * K * R * S * C.
    launch_cutlass<Kernel>(conv2d_weight_gradient_kernel<Kernel>,
                           {problem_of(c, slices),
                            output_ref<Element>(c, grad_output),
                            input_ref<Element>(c, x),
                            weight_ref<float>(c, partial),
                            weight_ref<float>(c, partial),
                            {1.0f, 0.0f},
                            conv::SplitKMode::kParallel},
                           stream);
  });
}

}  // namespace skinfast
