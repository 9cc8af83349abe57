#include <cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h>

#include <map>
#include <mutex>
#include <string>

#include "conv2d/conv2d_cutlass_epilogue.h"
#include "conv2d/conv2d_cutlass_kernels.h"

namespace skinfast {
namespace {

template <typename Kernel>
__global__ void conv2d_forward_kernel(typename Kernel::Params params) {
  run_cutlass<Kernel>(params);
}

}  // namespace

void cutlass_conv2d(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& c,
                    const Conv2dForward& tensors, cudaStream_t stream) {
#ifdef SKINFAST_CUTLASS_SM90
  if (facts_of(kernel).is_persistent) return persistent_conv2d(kernel, c, tensors, stream);
#endif
  dispatch_tile(kernel, dtype, [&]<typename T, typename Tile>() {
    using Element = typename CutlassElement<T>::type;
    using Kernel = typename conv::kernel::DefaultConv2dFpropWithBroadcast<
        Element, TensorNHWC, Element, TensorNHWC, Element, TensorNHWC, float,
        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, typename Tile::Block,
        typename Tile::Warp, typename Tile::Instruction,
        BiasResidualReLU<Element, static_cast<int>(kTensorCoreChannels)>,
        threadblock::GemmIdentityThreadblockSwizzle<1>, Tile::kStages, cutlass::arch::OpMultiplyAdd,
        conv::IteratorAlgorithm::kOptimized>::Kernel;
    launch_cutlass<Kernel>(conv2d_forward_kernel<Kernel>,
                           {problem_of(c),
                            input_ref<Element>(c, tensors.x),
                            weight_ref<Element>(c, tensors.weight),
                            output_ref<Element>(c, tensors.residual),
                            output_ref<Element>(c, tensors.output),
                            {tensors.residual != nullptr, tensors.with_relu},
                            conv::SplitKMode::kSerial,
                            const_cast<void*>(tensors.bias)},
                           stream);
  });
}

const CudaDevice& cuda_device(int device) {
  static std::mutex mutex;
  static std::map<int, CudaDevice> devices;
  const std::lock_guard lock(mutex);
  CudaDevice& found = devices[device];
  if (found.name.empty()) {
    cudaDeviceProp properties;
    STD_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
#ifdef SKINFAST_CUTLASS_SM90
    const bool has_persistent_kernels = properties.major == 9 && properties.minor == 0;
#else
    const bool has_persistent_kernels = false;
#endif
    found = {properties.name, properties.multiProcessorCount, has_persistent_kernels};
  }
  return found;
}

}  // namespace skinfast
