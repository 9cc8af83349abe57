// 1x1 convolutions of stride 1 as matrix products on sm_90a: CUTLASS 3, a warp that loads tiles by
// TMA and warps that multiply them, as many blocks as the device has multiprocessors, each of which
// takes one tile of the output after another.
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "conv2d/conv2d_cutlass.h"
#include "conv2d/conv2d_cutlass_epilogue.h"

namespace skinfast {
namespace {

namespace collective = cutlass::epilogue::collective;
using cute::_1;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

using Element = cutlass::bfloat16_t;
constexpr int kAlignment = static_cast<int>(kTensorCoreChannels);

// Two groups of warps share a tile, or take turns: one multiplies while the other stores.
struct Persistent128x128 {
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
struct Persistent128x64 {
  using Tile = cute::Shape<cute::_128, cute::_64, cute::_64>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// A PointwiseProduct whose sums end in `Fusion`. Source: the element type of what that adds, or
// void.
template <typename Schedule, typename RightLayout, typename Source, typename Fusion>
struct Product {
  using Cluster = cute::Shape<_1, _1, _1>;
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Schedule::Tile, Cluster,
      collective::EpilogueTileAuto, float, float, Source, RowMajor, kAlignment, Element, RowMajor,
      kAlignment, typename Schedule::Epilogue, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      RightLayout, kAlignment, float, typename Schedule::Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  // As cutlass::gemm::device::GemmUniversalAdapter runs a kernel, but through our wrapper.
  static void run(const PointwiseProduct& p, const void* left, const void* right,
                  const void* source, void* output,
                  const typename Epilogue::FusionCallbacks::Arguments& fusion,
                  cudaStream_t stream) {
    const auto element = [](const void* data) { return static_cast<const Element*>(data); };
    const auto extent = [](int64_t size) { return static_cast<int>(size); };
    typename Mainloop::StrideB right_stride;
    if constexpr (std::is_same_v<RightLayout, ColumnMajor>) {
      right_stride = {p.depth, _1{}, 0};
    } else {
      right_stride = {_1{}, p.columns, 0};
    }
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    const typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {extent(p.rows), extent(p.columns), extent(p.depth), 1},
        {element(left), {p.depth, _1{}, 0}, element(right), right_stride},
        {fusion,
         element(source),
         {p.columns, _1{}, 0},
         static_cast<Element*>(output),
         {p.columns, _1{}, 0}},
        {device, cuda_device(device).multiprocessors}};
    SKINFAST_CHECK(Kernel::can_implement(arguments) && Kernel::get_workspace_size(arguments) == 0,
                   "conv2d: CUTLASS refuses this matrix product; set SKINFAST_CONV2D=cudnn");
    const auto kernel = &cutlass::device_kernel<Kernel>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Kernel::SharedStorageSize));
    const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
    launch(kernel, Kernel::get_grid_shape(params), Kernel::get_block_shape(),
           Kernel::SharedStorageSize, stream, params);
  }
};

template <typename Run>
void dispatch_schedule(Conv2dKernel kernel, const Run& run) {
  kernel == Conv2dKernel::kPersistent128x128 ? run.template operator()<Persistent128x128>()
                                             : run.template operator()<Persistent128x64>();
}

}  // namespace

void persistent_conv2d(Conv2dKernel kernel, const TensorCoreConv2d& c, const Conv2dForward& tensors,
                       cudaStream_t stream) {
  dispatch_schedule(kernel, [&]<typename Schedule>() {
    using Fusion = cutlass::epilogue::fusion::LinCombPerColBiasEltAct<OptionalReLU, Element, float>;
    using Forward = Product<Schedule, ColumnMajor, Element, Fusion>;
    typename Forward::Epilogue::FusionCallbacks::Arguments fusion;
    // At zero the source is not read; its descriptor is made all the same, of a tensor that exists.
    fusion.beta = tensors.residual ? 1.0f : 0.0f;
    fusion.bias_ptr = static_cast<const Element*>(tensors.bias);
    fusion.activation = {tensors.with_relu};
    Forward::run(forward_product(c), tensors.x, tensors.weight,
                 tensors.residual ? tensors.residual : tensors.output, tensors.output, fusion,
                 stream);
  });
}

void persistent_conv2d_input_gradient(Conv2dKernel kernel, const TensorCoreConv2d& c,
                                      const void* grad_output, const void* weight, void* grad_x,
                                      cudaStream_t stream) {
  dispatch_schedule(kernel, [&]<typename Schedule>() {
    using Fusion = cutlass::epilogue::fusion::LinearCombination<Element, float, void>;
    using Gradient = Product<Schedule, RowMajor, void, Fusion>;
    Gradient::run(input_gradient_product(c), grad_output, weight, nullptr, grad_x, {}, stream);
  });
}

}  // namespace skinfast
