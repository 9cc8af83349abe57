#include "batch_norm_linear/batch_norm_linear_lanes.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// dots[j] at f = G of kVectors vectors of features and kOutputGroup outputs; x and mean at f.
template <int kVectors, bool kWhole, typename T, typename A = accumulate_t<T>>
inline void gradient_dots(const T* x, const BatchNormLinearShape& shape, const A* mean,
                          const A* packed, int64_t lanes, A (*dots)[kFeatureBlock]) {
  vector_t<A> sums[kVectors][kOutputGroup] = {}, centre[kVectors];
  for (int v = 0; v < kVectors; ++v) centre[v] = load_lanes<kWhole>(mean + v * kLanes<A>, lanes);
  for (int64_t n = 0; n < shape.rows; ++n, x += shape.features, packed += kOutputGroup) {
    vector_t<A> centred[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      centred[v] = load_lanes<kWhole>(x + v * kLanes<A>, lanes) - centre[v];
    }
    // Rows lie pages apart, which no hardware prefetcher follows.
    __builtin_prefetch(x + 2 * kVectors * kLanes<A>);
#pragma GCC unroll 8
    for (int j = 0; j < kOutputGroup; ++j) {
      for (int v = 0; v < kVectors; ++v) sums[v][j] = centred[v] * packed[j] + sums[v][j];
    }
  }
  for (int j = 0; j < kOutputGroup; ++j) {
    for (int v = 0; v < kVectors; ++v) store_vector(dots[j] + v * kLanes<A>, sums[v][j]);
  }
}

template <typename A>
void finish_gradients(const BatchNormLinearBackward& a, int64_t first, int64_t count,
                      const A* reciprocal, const A (*dots)[kFeatureBlock]) {
  A norm_weight[kFeatureBlock], norm_bias[kFeatureBlock];
  A of_weight[kFeatureBlock] = {}, of_bias[kFeatureBlock] = {};
  for (int64_t f = 0; f < count; ++f) {
    norm_weight[f] =
        a.norm_weight == nullptr ? A(1) : static_cast<const A*>(a.norm_weight)[first + f];
    norm_bias[f] = a.norm_bias == nullptr ? A(0) : static_cast<const A*>(a.norm_bias)[first + f];
  }
  for (int64_t k = 0; k < a.shape.outputs; ++k) {
    const int64_t at = k * a.shape.features + first;
    const A sum = static_cast<const A*>(a.grad_bias)[k];
    const A* __restrict dot = dots[k];
    const A* __restrict weight = static_cast<const A*>(a.weight) + at;
    A* __restrict grad_weight = static_cast<A*>(a.grad_weight) + at;
    for (int64_t f = 0; f < count; ++f) {
      grad_weight[f] = weight_gradient(dot[f], sum, norm_weight[f], reciprocal[f], norm_bias[f]);
      of_weight[f] += weight[f] * dot[f];
      of_bias[f] += weight[f] * sum;
    }
  }
  A* __restrict grad_norm_weight = static_cast<A*>(a.grad_norm_weight) + first;
  A* __restrict grad_norm_bias = static_cast<A*>(a.grad_norm_bias) + first;
  for (int64_t f = 0; f < count; ++f) {
    grad_norm_weight[f] = of_weight[f] * reciprocal[f];
    grad_norm_bias[f] = of_bias[f];
  }
}

template <typename T>
void backward_block(const BatchNormLinearBackward& a, const void* packed, int64_t index) {
  using A = accumulate_t<T>;
  constexpr int64_t kStep = kTogether * kLanes<A>;
  const int64_t first = index * kFeatureBlock;
  const int64_t count = smaller(kFeatureBlock, a.shape.features - first);
  A dots[kMaxOutputs][kFeatureBlock];
  const T* x = static_cast<const T*>(a.x) + first;
  const A* variance = static_cast<const A*>(a.variance) + first;
  A mean[kFeatureBlock], reciprocal[kFeatureBlock];
  memcpy(mean, static_cast<const A*>(a.mean) + first, count * sizeof(A));
  for (int64_t f = 0; f < count; ++f) {
    reciprocal[f] = reciprocal_deviation(variance[f], static_cast<A>(a.eps));
  }
  if constexpr (kIsByte<T>) convert_block_to_bytes(a.pixels, first, count, mean, reciprocal);
  for (int64_t k = 0; k < a.shape.outputs; k += kOutputGroup) {
    const A* group = static_cast<const A*>(packed) + k * a.shape.rows;
    const auto dots_at = [&](int64_t f) {
      return reinterpret_cast<A(*)[kFeatureBlock]>(&dots[k][f]);
    };
    int64_t f = 0;
    for (; f + kStep <= count; f += kStep) {
      gradient_dots<kTogether, true>(x + f, a.shape, mean + f, group, kLanes<A>, dots_at(f));
    }
    for (; f < count; f += kLanes<A>) {
      gradient_dots<1, false>(x + f, a.shape, mean + f, group, smaller(kLanes<A>, count - f),
                              dots_at(f));
    }
  }
  finish_gradients<A>(a, first, count, reciprocal, dots);
}

}  // namespace

void batch_norm_linear_pack(DType dtype, const BatchNormLinearBackward& a, void* packed) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const int64_t N = a.shape.rows;
    const int64_t K = a.shape.outputs;
    for (int64_t k = 0; k < ceil_divide(K, kOutputGroup) * kOutputGroup; ++k) {
      const T* grad = static_cast<const T*>(a.grad_output) + k;
      A* to = static_cast<A*>(packed) + k / kOutputGroup * N * kOutputGroup + k % kOutputGroup;
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) {
        const A value = k < K ? load(grad[n * K]) : A(0);
        to[n * kOutputGroup] = value;
        sum += value;
      }
      if (k < K) static_cast<A*>(a.grad_bias)[k] = static_cast<A>(sum);
    }
  });
}

void batch_norm_linear_blocks_backward(DType dtype, const BatchNormLinearBackward& a,
                                       const void* packed, int64_t begin, int64_t end) {
  if (a.pixels.scale != nullptr) {
    for (int64_t i = begin; i < end; ++i) backward_block<uint8_t>(a, packed, i);
    return;
  }
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t i = begin; i < end; ++i) backward_block<T>(a, packed, i);
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

FourTensors batch_norm_linear_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                           const Tensor& mean, const Tensor& variance,
                                           const Tensor& weight, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double eps,
                                           const OptionalTensor& scale,
                                           const OptionalTensor& shift) {
  return batch_norm_linear_backward_host(
      grad_output, x, mean, variance, weight, norm_weight, norm_bias, eps, scale, shift,
      [](const BatchNormLinearBackward& call, const Tensor& x) {
        const int64_t groups = ceil_divide(call.shape.outputs, kOutputGroup);
        const Tensor packed = torch::stable::new_empty(x, {groups * kOutputGroup * call.shape.rows},
                                                       statistics_dtype(x));
        void* data = packed.mutable_data_ptr();
        SKINFAST_KERNEL(batch_norm_linear_pack)(dtype_of(x), call, data);
        const int64_t grain = ceil_divide(kElementGrain, kFeatureBlock * call.shape.rows);
        parallel_for(feature_blocks(call.shape), grain, [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(batch_norm_linear_blocks_backward)(dtype_of(x), call, data, begin, end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("batch_norm_linear_backward", TORCH_BOX(&batch_norm_linear_backward_cpu));
}

}  // namespace skinfast
#endif
