// The convolution and its gradients by their definition.
#include "core/relu.h"
#include "stand_in.h"

namespace stand_in {
namespace {

using skinfast::load;
using skinfast::relu;
using skinfast::store;

// visit(n, p, q, r, s, h, w) for every tap that meets the map.
template <typename Visit>
void for_each_tap(const TensorCoreConv2d& c, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / (c.P * c.Q), p = row / c.Q % c.P, q = row % c.Q;
    for (int64_t r = 0; r < c.R; ++r) {
      for (int64_t s = 0; s < c.S; ++s) {
        const int64_t h = p * c.stride_h + r - c.pad_h, w = q * c.stride_w + s - c.pad_w;
        if (h >= 0 && h < c.H && w >= 0 && w < c.W) visit(row, r, s, (n * c.H + h) * c.W + w);
      }
    }
  }
}

}  // namespace

void forward(const TensorCoreConv2d& c, const BFloat16* x, const BFloat16* weight,
             const BFloat16* bias, const BFloat16* residual, bool with_relu, BFloat16* output) {
  const int64_t rows = c.N * c.P * c.Q;
  for (int64_t k = 0; k < c.K; ++k) {
    for (int64_t row = 0; row < rows; ++row) {
      float sum = bias ? load(bias[k]) : 0.0f;
      if (residual) sum += load(residual[row * c.K + k]);
      for_each_tap(c, row, row + 1, [&](int64_t, int64_t r, int64_t s, int64_t pixel) {
        const BFloat16* w = weight + ((k * c.R + r) * c.S + s) * c.C;
        for (int64_t i = 0; i < c.C; ++i) sum += load(w[i]) * load(x[pixel * c.C + i]);
      });
      output[row * c.K + k] = store<BFloat16>(with_relu ? relu(sum) : sum);
    }
  }
}

void product(const skinfast::PointwiseProduct& p, const BFloat16* left, const BFloat16* right,
             bool forward, const BFloat16* bias, const BFloat16* residual, bool with_relu,
             BFloat16* output) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t column = 0; column < p.columns; ++column) {
      float sum = bias ? load(bias[column]) : 0.0f;
      if (residual) sum += load(residual[row * p.columns + column]);
      for (int64_t i = 0; i < p.depth; ++i) {
        sum += load(left[row * p.depth + i]) *
               load(right[forward ? column * p.depth + i : i * p.columns + column]);
      }
      output[row * p.columns + column] = store<BFloat16>(with_relu ? relu(sum) : sum);
    }
  }
}

void input_gradient(const TensorCoreConv2d& c, const BFloat16* grad_output, const BFloat16* weight,
                    BFloat16* grad_x) {
  for (int64_t i = 0; i < c.C; ++i) {
    float* sums = new float[c.N * c.H * c.W]();
    for_each_tap(c, 0, c.N * c.P * c.Q, [&](int64_t row, int64_t r, int64_t s, int64_t pixel) {
      for (int64_t k = 0; k < c.K; ++k) {
        sums[pixel] +=
            load(grad_output[row * c.K + k]) * load(weight[((k * c.R + r) * c.S + s) * c.C + i]);
      }
    });
    for (int64_t pixel = 0; pixel < c.N * c.H * c.W; ++pixel) {
      grad_x[pixel * c.C + i] = store<BFloat16>(sums[pixel]);
    }
    delete[] sums;
  }
}

void weight_gradient(const TensorCoreConv2d& c, const BFloat16* grad_output, const BFloat16* x,
                     float* grad_weight, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < c.weight_size(); ++i) grad_weight[i] = 0.0f;
  for_each_tap(c, begin, end, [&](int64_t row, int64_t r, int64_t s, int64_t pixel) {
    for (int64_t k = 0; k < c.K; ++k) {
      float* sums = grad_weight + ((k * c.R + r) * c.S + s) * c.C;
      const float g = load(grad_output[row * c.K + k]);
      for (int64_t i = 0; i < c.C; ++i) sums[i] += g * load(x[pixel * c.C + i]);
    }
  });
}

}  // namespace stand_in
