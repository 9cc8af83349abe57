// 1x1 convolutions of stride 1 as matrix products on sm_90a: CUTLASS 3, a warp that loads tiles by
// TMA and warps that multiply them, as many blocks as the device has multiprocessors, each of which
// takes one tile of the output after another.
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "conv2d/conv2d_cutlass.h"
#include "conv2d/conv2d_cutlass_epilogue.h"
#include "conv2d/conv2d_relu_mask_sm90.h"

namespace skinfast {
namespace {

namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;
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
template <typename Schedule, typename LeftLayout, typename RightLayout, typename Source,
          typename Output, typename Fusion>
struct Product {
  using Cluster = cute::Shape<_1, _1, _1>;
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Schedule::Tile, Cluster,
      collective::EpilogueTileAuto, float, float, Source, RowMajor, kAlignment, Output, RowMajor,
      16 / static_cast<int>(sizeof(Output)), typename Schedule::Epilogue, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LeftLayout, kAlignment, Element,
      RightLayout, kAlignment, float, typename Schedule::Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  // As cutlass::gemm::device::GemmUniversalAdapter runs a kernel, but through our wrapper.
  static void run(void (*entry)(typename Kernel::Params), const PointwiseProduct& p,
                  const void* left, const void* right, const void* source, void* output,
                  const typename Epilogue::FusionCallbacks::Arguments& fused, cudaStream_t stream) {
    const auto element = [](const void* data) { return static_cast<const Element*>(data); };
    const auto extent = [](int64_t size) { return static_cast<int>(size); };
    const auto slice = [&](int64_t size) { return p.slices > 1 ? size : 0; };
    typename Mainloop::StrideA left_stride;
    if constexpr (std::is_same_v<LeftLayout, RowMajor>) {
      left_stride = {p.depth, _1{}, slice(p.rows * p.depth)};
    } else {
      left_stride = {_1{}, p.rows, slice(p.rows * p.depth)};
    }
    typename Mainloop::StrideB right_stride;
    if constexpr (std::is_same_v<RightLayout, ColumnMajor>) {
      right_stride = {p.depth, _1{}, slice(p.columns * p.depth)};
    } else {
      right_stride = {_1{}, p.columns, slice(p.columns * p.depth)};
    }
    const typename Epilogue::StrideD output_stride{p.columns, _1{}, slice(p.rows * p.columns)};
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    const typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kBatched,
        {extent(p.rows), extent(p.columns), extent(p.depth), extent(p.slices)},
        {element(left), left_stride, element(right), right_stride},
        {fused, element(source), output_stride, static_cast<Output*>(output), output_stride},
        {device, cuda_device(device).multiprocessors}};
    SKINFAST_CHECK(Kernel::can_implement(arguments) && Kernel::get_workspace_size(arguments) == 0,
                   "conv2d: CUTLASS refuses this matrix product; set SKINFAST_CONV2D=cudnn");
    STD_CUDA_CHECK(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Kernel::SharedStorageSize));
    const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
    launch(entry, Kernel::get_grid_shape(params), Kernel::get_block_shape(),
           Kernel::SharedStorageSize, stream, params);
  }
};

// What cutlass::device_kernel does, in entries with names of ours, as in conv2d_cutlass_kernels.h.
template <typename Kernel>
__device__ void run_persistent(const typename Kernel::Params& params) {
  extern __shared__ char memory[];
  Kernel()(params, memory);
}
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    persistent_forward_kernel(const __grid_constant__ typename Kernel::Params params) {
  run_persistent<Kernel>(params);
}
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    persistent_statistics_kernel(const __grid_constant__ typename Kernel::Params params) {
  run_persistent<Kernel>(params);
}
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    persistent_input_gradient_kernel(const __grid_constant__ typename Kernel::Params params) {
  run_persistent<Kernel>(params);
}
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    persistent_input_gradient_statistics_kernel(const __grid_constant__
                                                typename Kernel::Params params) {
  run_persistent<Kernel>(params);
}
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
    persistent_weight_gradient_kernel(const __grid_constant__ typename Kernel::Params params) {
  run_persistent<Kernel>(params);
}

// Of every column the sum over the rows of each tile; `Add` takes the sum so far and its inputs in
// this order. Rows past the end are zeros, as TMA loads them, and add nothing.
template <typename Schedule, template <class> typename Add, typename Order>
using ColumnSum =
    fusion::Sm90RowReduction<Add, cutlass::plus, cutlass::plus, 0, typename Schedule::Tile, float,
                             float, cutlass::FloatRoundStyle::round_to_nearest,
                             cute::Stride<cute::_0, _1, cute::_0>, 4, /*EnableNullptr=*/false,
                             /*FinalReduction=*/false, /*VisitCheckOOB=*/false, Order>;
template <typename Schedule>
using SumOfValues = ColumnSum<Schedule, cutlass::plus, cute::seq<0, 1>>;
// Two inputs; it hands on the first.
template <typename Schedule>
using SumOfProducts = ColumnSum<Schedule, cutlass::homogeneous_multiply_add, cute::seq<1, 2, 0>>;
template <typename Schedule>
using SumOfSquares = ColumnSum<Schedule, cutlass::homogeneous_multiply_add, cute::seq<1, 1, 0>>;

template <typename Schedule>
using ColumnSums = fusion::Sm90EVT<SumOfValues<Schedule>,
                                   fusion::Sm90EVT<SumOfSquares<Schedule>, fusion::Sm90AccFetch>>;

// The same of what the ReLU lets pass, with products by the source, which is not added.
using SourceInFloat =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, float, float,
                                        cutlass::FloatRoundStyle::round_to_nearest>,
                    fusion::Sm90SrcFetch<Element>>;
template <typename Schedule>
using MaskedColumnSums = fusion::Sm90EVT<
    SumOfValues<Schedule>,
    fusion::Sm90EVT<SumOfProducts<Schedule>, fusion::Sm90EVT<ReLUMask, fusion::Sm90AccFetch>,
                    SourceInFloat>>;

template <typename Run>
void dispatch_schedule(Conv2dKernel kernel, const Run& run) {
  kernel == Conv2dKernel::kPersistent128x128 ? run.template operator()<Persistent128x128>()
                                             : run.template operator()<Persistent128x64>();
}

}  // namespace

void persistent_conv2d(Conv2dKernel kernel, const TensorCoreConv2d& c, const Conv2dForward& tensors,
                       cudaStream_t stream) {
  dispatch_schedule(kernel, [&]<typename Schedule>() {
    using Fusion = fusion::LinCombPerColBiasEltAct<OptionalReLU, Element, float>;
    using Forward = Product<Schedule, RowMajor, ColumnMajor, Element, Element, Fusion>;
    typename Forward::Epilogue::FusionCallbacks::Arguments fused;
    // At zero the source is not read; its descriptor is made all the same, of a tensor that exists.
    fused.beta = tensors.residual ? 1.0f : 0.0f;
    fused.bias_ptr = static_cast<const Element*>(tensors.bias);
    fused.activation = {tensors.with_relu};
    Forward::run(persistent_forward_kernel<typename Forward::Kernel>, forward_product(c), tensors.x,
                 tensors.weight, tensors.residual ? tensors.residual : tensors.output,
                 tensors.output, fused, stream);
  });
}

void persistent_conv2d_statistics(const TensorCoreConv2d& c, const void* x, const void* weight,
                                  void* output, float* sums, float* squares, cudaStream_t stream) {
  using Forward =
      Product<Persistent128x64, RowMajor, ColumnMajor, void, Element, ColumnSums<Persistent128x64>>;
  Forward::run(persistent_statistics_kernel<typename Forward::Kernel>, forward_product(c), x,
               weight, nullptr, output, {{{}, {squares}}, {sums}}, stream);
}

void persistent_conv2d_input_gradient(Conv2dKernel kernel, const TensorCoreConv2d& c,
                                      const void* grad_output, const void* weight, void* grad_x,
                                      cudaStream_t stream) {
  dispatch_schedule(kernel, [&]<typename Schedule>() {
    using Fusion = fusion::LinearCombination<Element, float, void>;
    using Gradient = Product<Schedule, RowMajor, RowMajor, void, Element, Fusion>;
    Gradient::run(persistent_input_gradient_kernel<typename Gradient::Kernel>,
                  input_gradient_product(c), grad_output, weight, nullptr, grad_x, {}, stream);
  });
}

void persistent_conv2d_input_gradient_statistics(const TensorCoreConv2d& c,
                                                 const MaskedInputGradient& tensors,
                                                 cudaStream_t stream) {
  using Gradient = Product<Persistent128x64, RowMajor, RowMajor, Element, Element,
                           MaskedColumnSums<Persistent128x64>>;
  typename Gradient::Epilogue::FusionCallbacks::Arguments fused{
      {{{}, {tensors.mask}}, {}, {tensors.products}}, {tensors.sums}};
  Gradient::run(persistent_input_gradient_statistics_kernel<typename Gradient::Kernel>,
                input_gradient_product(c), tensors.grad_output, tensors.weight, tensors.x,
                tensors.grad_x, fused, stream);
}

void persistent_conv2d_weight_gradient(Conv2dKernel kernel, const TensorCoreConv2d& c,
                                       const void* grad_output, const void* x, float* partial,
                                       int64_t slices, cudaStream_t stream) {
  dispatch_schedule(kernel, [&]<typename Schedule>() {
    using Fusion = fusion::LinearCombination<float, float, void>;
    using Gradient = Product<Schedule, ColumnMajor, RowMajor, void, float, Fusion>;
    Gradient::run(persistent_weight_gradient_kernel<typename Gradient::Kernel>,
                  weight_gradient_product(c, slices), grad_output, x, nullptr, partial, {}, stream);
  });
}

}  // namespace skinfast
