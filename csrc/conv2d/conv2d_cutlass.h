// Convolutions on tensor cores, through CUTLASS: what conv2d_cutlass_*.cu compute, where the build
// found CUTLASS (SKINFAST_CUTLASS). Everything is channels_last, bfloat16 or float16, 16-byte
// aligned; sums are in float32. `conv` is one that tensor_cores_take, with C divisible by 8.
#pragma once

#include <string>

#include "conv2d/conv2d_tensor_core.h"
#include "core/cuda.h"

namespace skinfast {

// output = conv2d(x, weight) + bias + residual, through a ReLU if wanted.
// x [N, H, W, C], weight [K, R, S, C], bias [K] or null, residual (or null) and output [N, P, Q,
// K].
struct Conv2dForward {
  const void *x, *weight, *bias, *residual;
  void* output;
  bool with_relu;
};
void cutlass_conv2d(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& conv,
                    const Conv2dForward& tensors, cudaStream_t stream);

// grad_x [N, H, W, C] of grad_output [N, P, Q, K].
void cutlass_conv2d_input_gradient(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& conv,
                                   const void* grad_output, const void* weight, void* grad_x,
                                   cudaStream_t stream);

// partial [slices, K, R, S, C], float32: the gradient of the weights over each slice of the sum.
void cutlass_conv2d_weight_gradient(Conv2dKernel kernel, DType dtype, const TensorCoreConv2d& conv,
                                    const void* grad_output, const void* x, float* partial,
                                    int64_t slices, cudaStream_t stream);

// The same for what persistent_kernels_take, in bfloat16: conv2d_persistent_sm90.cu, which is built
// for sm_90a alone (SKINFAST_CUTLASS_SM90).
void persistent_conv2d(Conv2dKernel kernel, const TensorCoreConv2d& conv,
                       const Conv2dForward& tensors, cudaStream_t stream);
void persistent_conv2d_input_gradient(Conv2dKernel kernel, const TensorCoreConv2d& conv,
                                      const void* grad_output, const void* weight, void* grad_x,
                                      cudaStream_t stream);
void persistent_conv2d_weight_gradient(Conv2dKernel kernel, const TensorCoreConv2d& conv,
                                       const void* grad_output, const void* x, float* partial,
                                       int64_t slices, cudaStream_t stream);

// output = conv2d(x, weight), and of each tile of it the columns' sums and sums of squares:
// [partials.tiles, partials.columns], partials = statistics_partials(forward_product(conv)).
void persistent_conv2d_statistics(const TensorCoreConv2d& conv, const void* x, const void* weight,
                                  void* output, float* sums, float* squares, cudaStream_t stream);

// grad_x as above, but zero where the mask has no bit (i % 8 of byte i / 8, i of [N, H, W, C] as it
// lies); of each tile of it the columns' sums, and those of its products by x [N, H, W, C]:
// [partials.tiles, partials.columns], partials = statistics_partials(input_gradient_product(conv)).
struct MaskedInputGradient {
  const void *grad_output, *weight, *x;
  const uint8_t* mask;
  void* grad_x;
  float *sums, *products;
};
void persistent_conv2d_input_gradient_statistics(const TensorCoreConv2d& conv,
                                                 const MaskedInputGradient& tensors,
                                                 cudaStream_t stream);

struct CudaDevice {
  std::string name;  // as CUDA has it: the key of the table of choices
  int multiprocessors;
  bool has_persistent_kernels;  // built, and for its architecture
};
const CudaDevice& cuda_device(int device);

}  // namespace skinfast
