// csrc/conv2d/conv2d_cutlass.h on the CPU. It counts its calls, so that a test sees which kernel
// was chosen, and refuses what the real kernels could not read: everything else is the host code
// that runs on a GPU as well.
#include "stand_in.h"

#include <array>
#include <cstdio>
#include <cstdlib>

#include "conv2d/conv2d_cutlass.h"

namespace {

using namespace skinfast;

std::array<std::array<int, kConv2dKernels.size()>, kConv2dOperations> calls{};
CudaDevice device{"stand-in", 132, true};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "the tensor-core kernels need %s\n", what);
  std::abort();
}

void count(Conv2dOperation operation, Conv2dKernel kernel, DType dtype,
           const TensorCoreConv2d& conv, std::initializer_list<const void*> pointers) {
  ++calls[static_cast<size_t>(operation)][static_cast<size_t>(kernel)];
  require(dtype == DType::kBFloat16, "bfloat16 here");
  require(!facts_of(kernel).is_persistent || persistent_kernels_take(operation, dtype, conv),
          "a 1x1 kernel, where they are persistent");
  require(conv.C % kTensorCoreChannels == 0 && conv.K % kTensorCoreChannels == 0,
          "channels divisible by 8");
  for (const void* pointer : pointers) require(is_aligned(pointer), "16-byte aligned tensors");
}

template <typename T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

// Of each column and tile of the output: the sum of the values, and of their products by factors.
void sum_tiles(const PointwiseProduct& product, const BFloat16* values, const BFloat16* factors,
               float* sums, float* products) {
  const StatisticsPartials partials = statistics_partials(product);
  for (int64_t i = 0; i < partials.tiles * partials.columns; ++i) sums[i] = products[i] = 0.0f;
  for (int64_t i = 0; i < product.rows * product.columns; ++i) {
    const int64_t tile = i / product.columns / facts_of(kStatisticsKernel).rows;
    const int64_t place = tile * partials.columns + i % product.columns;
    sums[place] += load(values[i]);
    products[place] += load(values[i]) * load(factors[i]);
  }
}

}  // namespace

namespace skinfast {

void cutlass_conv2d(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& conv,
                    const Conv2dForward& t, cudaStream_t) {
  const auto operation = t.residual    ? Conv2dOperation::kForwardAddReLU
                         : t.with_relu ? Conv2dOperation::kForwardReLU
                                       : Conv2dOperation::kForward;
  count(operation, kernel, dtype, conv, {t.x, t.weight, t.bias, t.residual, t.output});
  const auto *x = as<BFloat16>(t.x), *weight = as<BFloat16>(t.weight);
  const auto *bias = as<BFloat16>(t.bias), *residual = as<BFloat16>(t.residual);
  auto* output = static_cast<BFloat16*>(t.output);
  if (facts_of(kernel).is_persistent) {
    stand_in::product(forward_product(conv), x, weight, /*forward=*/true, bias, residual,
                      t.with_relu, output);
  } else {
    stand_in::forward(conv, x, weight, bias, residual, t.with_relu, output);
  }
}

void persistent_conv2d_statistics(const TensorCoreConv2d& conv, const void* x, const void* weight,
                                  void* output, float* sums, float* squares, cudaStream_t) {
  const auto operation = Conv2dOperation::kForwardStatistics;
  count(operation, kStatisticsKernel, DType::kBFloat16, conv, {x, weight, output});
  const PointwiseProduct product = forward_product(conv);
  auto* values = static_cast<BFloat16*>(output);
  stand_in::product(product, as<BFloat16>(x), as<BFloat16>(weight), /*forward=*/true, nullptr,
                    nullptr, /*with_relu=*/false, values);
  sum_tiles(product, values, values, sums, squares);
}

void persistent_conv2d_input_gradient_statistics(const TensorCoreConv2d& conv,
                                                 const MaskedInputGradient& t, cudaStream_t) {
  const auto operation = Conv2dOperation::kInputGradientStatistics;
  count(operation, kStatisticsKernel, DType::kBFloat16, conv,
        {t.grad_output, t.weight, t.x, t.grad_x});
  const PointwiseProduct product = input_gradient_product(conv);
  auto* grad_x = static_cast<BFloat16*>(t.grad_x);
  stand_in::product(product, as<BFloat16>(t.grad_output), as<BFloat16>(t.weight),
                    /*forward=*/false, nullptr, nullptr, /*with_relu=*/false, grad_x);
  for (int64_t i = 0; i < product.rows * product.columns; ++i) {
    if ((t.mask[i / 8] >> (i % 8) & 1) == 0) grad_x[i] = store<BFloat16>(0.0f);
  }
  sum_tiles(product, grad_x, as<BFloat16>(t.x), t.sums, t.products);
}

void cutlass_conv2d_input_gradient(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& conv,
                                   const void* grad_output, const void* weight, void* grad_x,
                                   cudaStream_t) {
  count(Conv2dOperation::kInputGradient, kernel, dtype, conv, {grad_output, weight, grad_x});
  if (facts_of(kernel).is_persistent) {
    stand_in::product(input_gradient_product(conv), as<BFloat16>(grad_output), as<BFloat16>(weight),
                      /*forward=*/false, nullptr, nullptr, /*with_relu=*/false,
                      static_cast<BFloat16*>(grad_x));
  } else {
    stand_in::input_gradient(conv, as<BFloat16>(grad_output), as<BFloat16>(weight),
                             static_cast<BFloat16*>(grad_x));
  }
}

void cutlass_conv2d_weight_gradient(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& conv,
                                    const void* grad_output, const void* x, float* partial,
                                    int64_t slices, cudaStream_t) {
  count(Conv2dOperation::kWeightGradient, kernel, dtype, conv, {grad_output, x, partial});
  const int64_t rows = conv.N * conv.P * conv.Q, step = (rows + slices - 1) / slices;
  if (facts_of(kernel).is_persistent) {
    const PointwiseProduct product = weight_gradient_product(conv, slices);
    require(product.depth * product.slices == rows, "slices of one length");
    require(product.rows * product.columns == conv.weight_size(), "all weights");
  }
  for (int64_t slice = 0; slice < slices; ++slice) {
    stand_in::weight_gradient(conv, as<BFloat16>(grad_output), as<BFloat16>(x),
                              partial + slice * conv.weight_size(), std::min(rows, slice * step),
                              std::min(rows, (slice + 1) * step));
  }
}

const CudaDevice& cuda_device(int) { return device; }

}  // namespace skinfast

// For ctypes.
extern "C" __attribute__((visibility("default"))) int stand_in_calls(int operation, int kernel) {
  return calls[operation][kernel];
}
extern "C" __attribute__((visibility("default"))) long stand_in_slices(int kernel, long rows,
                                                                       long K, long columns) {
  const TensorCoreConv2d conv{rows, columns, 1, 1, K, 1, 1, 1, 1, 1, 1, 0, 0};
  return weight_gradient_slices(static_cast<Conv2dKernel>(kernel), conv);
}
extern "C" __attribute__((visibility("default"))) void stand_in_device(bool persistent_kernels) {
  device.has_persistent_kernels = persistent_kernels;
}
// Kernel, dtype and operation by their numbers; elements of 2 bytes.
extern "C" __attribute__((visibility("default"))) bool stand_in_takes(int kernel, int dtype,
                                                                      int operation, long N, long C,
                                                                      long side, long K, long R,
                                                                      long stride) {
  const TensorCoreConv2d conv{
      N,      C,      side,  side, K, R, R, (side - 1) / stride + 1, (side - 1) / stride + 1,
      stride, stride, R / 2, R / 2};
  return kernel_takes(static_cast<Conv2dKernel>(kernel), static_cast<Conv2dOperation>(operation),
                      static_cast<DType>(dtype), conv);
}
