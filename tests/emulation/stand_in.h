// What stands in for the tensor-core kernels where there is no GPU: the same sums on the CPU, in
// bfloat16. Two of them: plain loops, and CUTLASS's own reference through the mapping that the
// kernels use.
#pragma once

#include "conv2d/conv2d_tensor_core.h"

namespace stand_in {

using skinfast::BFloat16;
using skinfast::TensorCoreConv2d;

void forward(const TensorCoreConv2d& conv, const BFloat16* x, const BFloat16* weight,
             const BFloat16* bias, const BFloat16* residual, bool with_relu, BFloat16* output);
// output = left times right; right column by column if it is the weights' transpose (forward).
void product(const skinfast::PointwiseProduct& shape, const BFloat16* left, const BFloat16* right,
             bool forward, const BFloat16* bias, const BFloat16* residual, bool with_relu,
             BFloat16* output);
void input_gradient(const TensorCoreConv2d& conv, const BFloat16* grad_output,
                    const BFloat16* weight, BFloat16* grad_x);
// Of the rows [begin, end) of N * P * Q.
void weight_gradient(const TensorCoreConv2d& conv, const BFloat16* grad_output, const BFloat16* x,
                     float* grad_weight, int64_t begin, int64_t end);

}  // namespace stand_in
