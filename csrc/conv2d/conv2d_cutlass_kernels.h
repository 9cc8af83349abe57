// What the three convolution files on CUTLASS share: tiles, the mapping of a convolution onto
// CUTLASS's problem, the launch. CUTLASS 2's implicit matrix products for sm_80, which every later
// device runs as well.
#pragma once

#include <cutlass/conv/device/implicit_gemm_convolution.h>
#include <cutlass/cutlass.h>

#include "conv2d/conv2d_cutlass.h"

namespace skinfast {

namespace conv = cutlass::conv;
namespace threadblock = cutlass::gemm::threadblock;

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

// As cutlass::conv::device::ImplicitGemmConvolution runs a kernel, but through our wrapper, and
// without its clearing of a workspace that parallel slices overwrite in full.
template <typename Kernel>
void launch_cutlass(const typename Kernel::Arguments& arguments, cudaStream_t stream) {
  const cutlass::Status status =
      conv::device::ImplicitGemmConvolution<Kernel>::can_implement(arguments);
  SKINFAST_CHECK(status == cutlass::Status::kSuccess, "conv2d: CUTLASS refuses this convolution (",
                 cutlass::cutlassGetStatusString(status), "); set SKINFAST_CONV2D=cudnn");
  const typename Kernel::Params params(arguments, nullptr);
  const auto kernel = &cutlass::Kernel<Kernel>;
  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Kernel::SharedStorage));
  if constexpr (kSharedBytes >= (48 << 10)) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  }
  launch(kernel, typename Kernel::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape),
         dim3(Kernel::kThreadCount), kSharedBytes, stream, params);
}

}  // namespace skinfast
