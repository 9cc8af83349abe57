// output = conv2d(x, weight) + bias, and its gradients.
//
// On the CPU the convolutions that are matrix products at heart (1x1 kernels, and small maps, whose
// patches are few) run as products on the tensors as they are stored; a general library reorders
// weights at every call, which at a few rows costs many times the arithmetic. Gradients that ATen
// is slow at are such products too. 3x3 kernels take fewer multiplications by minimal filtering
// (conv2d_winograd.h). All others, and all on CUDA, are ATen's.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// A convolution of one group and dilation 1 on channels_last tensors:
// x [N, H, W, C], weight [K, R, S, C], output [N, P, Q, K].
struct PatchConv2d {
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;

  int64_t rows() const { return N * P * Q; }
  int64_t patch() const { return R * S * C; }
  bool is_single_tap() const { return R * S == 1; }
  // Whether x, row by row, is the matrix of patches already.
  bool is_pointwise() const {
    return R == 1 && S == 1 && P == H && Q == W && stride_h == 1 && stride_w == 1 && pad_h == 0 &&
           pad_w == 0;
  }
};

// CPU kernels. patches [N * P * Q, R * S * C]: the input under the kernel, zero in the padding.
// Rows [begin, end).
SKINFAST_DECLARE_KERNEL(void gather_patches(DType dtype, const PatchConv2d& conv, const void* x,
                                            void* patches, int64_t begin, int64_t end))
// grad_x = the sum of the patches' gradients over each pixel; pixels [begin, end) of N * H * W.
SKINFAST_DECLARE_KERNEL(void scatter_patches(DType dtype, const PatchConv2d& conv,
                                             const void* grad_patches, void* grad_x, int64_t begin,
                                             int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "conv2d/conv2d_host.h"
#endif
