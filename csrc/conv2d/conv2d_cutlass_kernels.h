// What the three convolution files on CUTLASS share: tiles and the launch. CUTLASS 2's implicit
// matrix products for sm_80, which every later device runs as well.
#pragma once

#include <cutlass/conv/device/implicit_gemm_convolution.h>
#include <cutlass/cutlass.h>

#include "conv2d/conv2d_cutlass.h"
#include "conv2d/conv2d_cutlass_problem.h"

namespace skinfast {

namespace threadblock = cutlass::gemm::threadblock;

template <int kRows, int kColumns, int kWarpRows, int kWarpColumns>
struct Conv2dTile {
  using Block = cutlass::gemm::GemmShape<kRows, kColumns, static_cast<int>(kTensorCoreDepth)>;
  using Warp =
      cutlass::gemm::GemmShape<kWarpRows, kWarpColumns, static_cast<int>(kTensorCoreDepth)>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
  static constexpr int kStages = 4;
};
using Tile128x128 = Conv2dTile<128, 128, 64, 64>;
using Tile128x64 = Conv2dTile<128, 64, 64, 32>;

// Call `run.template operator()<T, Tile>()` for this dtype and kernel.
template <typename Run>
void dispatch_tile(Conv2dKernel kernel, DType dtype, const Run& run) {
  const bool wide = kernel == Conv2dKernel::kTile128x128;
  if (dtype == DType::kHalf) {
    wide ? run.template operator()<Half, Tile128x128>()
         : run.template operator()<Half, Tile128x64>();
  } else {
    wide ? run.template operator()<BFloat16, Tile128x128>()
         : run.template operator()<BFloat16, Tile128x64>();
  }
}

// What cutlass::Kernel does. It is called from entries with names of ours, by which profilers,
// sanitizers and the table of docs/performance.md tell them from each other and from cuDNN's.
template <typename Kernel>
__device__ void run_cutlass(const typename Kernel::Params& params) {
  extern __shared__ int shared[];
  Kernel()(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

// As cutlass::conv::device::ImplicitGemmConvolution runs a kernel, but through our wrapper, and
// without its clearing of a workspace that parallel slices overwrite in full.
template <typename Kernel>
void launch_cutlass(void (*entry)(typename Kernel::Params),
                    const typename Kernel::Arguments& arguments, cudaStream_t stream) {
  const cutlass::Status status =
      conv::device::ImplicitGemmConvolution<Kernel>::can_implement(arguments);
  SKINFAST_CHECK(status == cutlass::Status::kSuccess, "conv2d: CUTLASS refuses this convolution (",
                 cutlass::cutlassGetStatusString(status), "); set SKINFAST_CONV2D=cudnn");
  const typename Kernel::Params params(arguments, nullptr);
  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Kernel::SharedStorage));
  if constexpr (kSharedBytes >= (48 << 10)) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  }
  launch(entry, typename Kernel::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape),
         dim3(Kernel::kThreadCount), kSharedBytes, stream, params);
}

}  // namespace skinfast
