#include "batch_norm_linear/batch_norm_linear_lanes.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// A block of features; arrays are zero beyond its `count`, so that whole vectors may be read.
template <typename A>
struct FeatureBlock {
  int64_t first, count;
  alignas(SKINFAST_VECTOR_BYTES) A mean[kFeatureBlock];
  alignas(SKINFAST_VECTOR_BYTES) A weight[kMaxOutputs][kFeatureBlock];  // scaled by s
};

// The sum of kCount lanes, a power of two, by halves: the sum in order, with its many instructions,
// takes a quarter longer on the whole pass.
template <int kCount, typename A>
inline A fold_lanes(const A* lanes) {
  if constexpr (kCount == 2) {
    return lanes[0] + lanes[1];
  } else {
    typedef A Half __attribute__((vector_size(kCount / 2 * sizeof(A))));
    Half low, high;
    memcpy(&low, lanes, sizeof(low));
    memcpy(&high, lanes + kCount / 2, sizeof(high));
    low += high;
    A sums[kCount / 2];
    memcpy(sums, &low, sizeof(low));
    return fold_lanes<kCount / 2>(sums);
  }
}

template <typename A>
inline A fold_lanes(vector_t<A> value) {
  A lanes[kLanes<A>];
  store_vector(lanes, value);
  return fold_lanes<kLanes<A>>(lanes);
}

// The moments of x [rows, count], rows `stride` apart; `merged` has planes of pivot, offset and m2.
template <typename T, typename A = accumulate_t<T>>
void merge_rows(const T* x, int64_t stride, int64_t rows, int64_t count, int64_t rows_before,
                A (*__restrict merged)[kFeatureBlock]) {
  A pivot[kFeatureBlock] = {}, sum[kFeatureBlock] = {}, squares[kFeatureBlock] = {};
  const int64_t pivot_rows = smaller(rows, kPivotRows);
  for (int64_t row = 0; row < pivot_rows; ++row) {
    const T* __restrict px = x + row * stride;
    for (int64_t f = 0; f < count; ++f) pivot[f] += load(px[f]);
  }
  for (int64_t f = 0; f < count; ++f) pivot[f] /= static_cast<A>(pivot_rows);
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict px = x + row * stride;
    for (int64_t f = 0; f < count; ++f) {
      const A deviation = load(px[f]) - pivot[f];
      sum[f] += deviation;
      squares[f] += deviation * deviation;
    }
  }
  for (int64_t f = 0; f < count; ++f) {
    const Moments<A> moments =
        merge_moments<A>({static_cast<A>(rows_before), merged[0][f], merged[1][f], merged[2][f]},
                         shifted_moments(static_cast<A>(rows), pivot[f], sum[f], squares[f]));
    merged[0][f] = moments.pivot;
    merged[1][f] = moments.offset;
    merged[2][f] = moments.m2;
  }
}

// Rows whose squares a float adds up exactly.
constexpr int64_t kExactRows = 256;
// Vectors of bytes that are added up together, for their latency.
constexpr int kByteVectors = 4;

// sums, squares [features] of x [rows, features], rows `stride` apart, at most kExactRows of them.
template <int kVectors, bool kWhole>
inline void add_bytes(const uint8_t* x, int64_t stride, int64_t rows, int64_t lanes, int64_t* sums,
                      int64_t* squares) {
  vector_t<float> sum[kVectors] = {}, squared[kVectors] = {};
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    for (int v = 0; v < kVectors; ++v) {
      const vector_t<float> bytes = load_lanes<kWhole>(x + v * kLanes<float>, lanes);
      sum[v] += bytes;
      squared[v] = bytes * bytes + squared[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int64_t i = 0; i < lanes; ++i) {
      sums[v * kLanes<float> + i] += static_cast<int64_t>(sum[v][i]);
      squares[v * kLanes<float> + i] += static_cast<int64_t>(squared[v][i]);
    }
  }
}

void set_byte_statistics(const BatchNormLinearForward& a, int64_t first, int64_t count, float* mean,
                         float* variance) {
  constexpr int64_t kTogetherBytes = kByteVectors * kLanes<float>;
  const int64_t N = a.shape.rows, F = a.shape.features;
  int64_t sums[kFeatureBlock] = {}, squares[kFeatureBlock] = {};
  for (int64_t row = 0; row < N; row += kExactRows) {
    const uint8_t* x = static_cast<const uint8_t*>(a.x) + row * F + first;
    const int64_t rows = smaller(kExactRows, N - row);
    int64_t f = 0;
    for (; f + kTogetherBytes <= count; f += kTogetherBytes) {
      add_bytes<kByteVectors, true>(x + f, F, rows, kLanes<float>, sums + f, squares + f);
    }
    for (; f < count; f += kLanes<float>) {
      const int64_t lanes = smaller(kLanes<float>, count - f);
      add_bytes<1, false>(x + f, F, rows, lanes, sums + f, squares + f);
    }
  }
  for_each_channel(a.pixels, first, count,
                   [&](float scale, float shift, int64_t begin, int64_t end) {
                     for (int64_t f = begin; f < end; ++f) {
                       byte_statistics(sums[f], squares[f], N, scale, shift, mean[f], variance[f]);
                     }
                   });
}

template <typename T, typename A = accumulate_t<T>>
void set_statistics(const BatchNormLinearForward& a, int64_t first, int64_t count) {
  A* __restrict mean = static_cast<A*>(a.mean) + first;
  A* __restrict variance = static_cast<A*>(a.variance) + first;
  if (!a.training) {
    memcpy(mean, static_cast<const A*>(a.running_mean) + first, count * sizeof(A));
    memcpy(variance, static_cast<const A*>(a.running_var) + first, count * sizeof(A));
    return;
  }
  if constexpr (kIsByte<T>) return set_byte_statistics(a, first, count, mean, variance);
  const T* x = static_cast<const T*>(a.x) + first;
  const int64_t N = a.shape.rows, F = a.shape.features;
  A merged[3][kFeatureBlock] = {};
  for (int64_t row = 0; row < N; row += kTileRows) {
    merge_rows(x + row * F, F, smaller(kTileRows, N - row), count, row, merged);
  }
  for (int64_t f = 0; f < count; ++f) {
    mean[f] = merged[0][f] + merged[1][f];
    variance[f] = merged[2][f] / static_cast<A>(N);
  }
}

// Fills the block; constants [K] = sum_f norm_bias[f] weight[k,f].
template <typename T, typename A = accumulate_t<T>>
void prepare(const BatchNormLinearForward& a, FeatureBlock<A>& block, A* constants) {
  const int64_t first = block.first, count = block.count;
  const A* norm_weight = static_cast<const A*>(a.norm_weight);
  const A* norm_bias = static_cast<const A*>(a.norm_bias);
  const A* variance = static_cast<const A*>(a.variance) + first;
  A scale[kFeatureBlock], shift[kFeatureBlock];
  for (int64_t f = 0; f < count; ++f) {
    scale[f] = reciprocal_deviation(variance[f], static_cast<A>(a.eps));
  }
  for (int64_t f = 0; f < count; ++f) {
    if (norm_weight != nullptr) scale[f] *= norm_weight[first + f];
    shift[f] = norm_bias == nullptr ? A(0) : norm_bias[first + f];
  }
  memset(block.mean, 0, sizeof(block.mean));
  memcpy(block.mean, static_cast<const A*>(a.mean) + first, count * sizeof(A));
  if constexpr (kIsByte<T>) convert_block_to_bytes(a.pixels, first, count, block.mean, scale);
  memset(block.weight, 0, sizeof(block.weight));
  for (int64_t k = 0; k < a.shape.outputs; ++k) {
    const A* __restrict weight = static_cast<const A*>(a.weight) + k * a.shape.features + first;
    A products[kFeatureBlock] = {};
    for (int64_t f = 0; f < count; ++f) {
      block.weight[k][f] = weight[f] * scale[f];
      products[f] = weight[f] * shift[f];
    }
    vector_t<A> sum{};
    for (int64_t f = 0; f < kFeatureBlock; f += kLanes<A>) sum += load_vector(products + f);
    constants[k] = fold_lanes<A>(sum);
  }
}

// sums[r][j] += centred x[r] . weight[j] for the vector of features at f, or its first lanes.
template <int kRows, bool kWhole, typename T, typename A = accumulate_t<T>>
inline void multiply(const T* x, int64_t stride, const A* mean, const A (*weight)[kFeatureBlock],
                     int64_t lanes, vector_t<A> (&sums)[kRows][kOutputGroup]) {
  vector_t<A> centred[kRows];
  for (int r = 0; r < kRows; ++r) {
    centred[r] = load_lanes<kWhole>(x + r * stride, lanes) - load_vector(mean);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kOutputGroup; ++j) {
    const vector_t<A> w = load_vector(weight[j]);
    for (int r = 0; r < kRows; ++r) sums[r][j] = centred[r] * w + sums[r][j];
  }
}

// The block's share of kRows rows and of the outputs [k, k + kOutputGroup); x at the block, share
// at the first row.
template <int kRows, typename T, typename A = accumulate_t<T>>
void share_of_rows(const T* x, const BatchNormLinearShape& shape, const FeatureBlock<A>& block,
                   const A* constants, int64_t k, A* share) {
  vector_t<A> sums[kRows][kOutputGroup] = {};
  int64_t f = 0;
  const auto weight = [&] {
    return reinterpret_cast<const A(*)[kFeatureBlock]>(&block.weight[k][f]);
  };
  for (; f + kLanes<A> <= block.count; f += kLanes<A>) {
    multiply<kRows, true>(x + f, shape.features, block.mean + f, weight(), kLanes<A>, sums);
  }
  if (f < block.count) {
    multiply<kRows, false>(x + f, shape.features, block.mean + f, weight(), block.count - f, sums);
  }
  for (int r = 0; r < kRows; ++r) {
    A totals[kOutputGroup];
#pragma GCC unroll 8
    for (int j = 0; j < kOutputGroup; ++j) totals[j] = fold_lanes<A>(sums[r][j]);
    for (int64_t j = 0; j < smaller(kOutputGroup, shape.outputs - k); ++j) {
      share[r * shape.outputs + k + j] = totals[j] + constants[k + j];
    }
  }
}

template <typename T>
void forward_block(const BatchNormLinearForward& a, int64_t index) {
  using A = accumulate_t<T>;
  const int64_t N = a.shape.rows, F = a.shape.features, K = a.shape.outputs;
  FeatureBlock<A> block;
  block.first = index * kFeatureBlock;
  block.count = smaller(kFeatureBlock, F - block.first);
  A constants[kMaxOutputs];
  set_statistics<T>(a, block.first, block.count);
  prepare<T>(a, block, constants);
  const T* x = static_cast<const T*>(a.x) + block.first;
  A* share = static_cast<A*>(a.partials) + index * N * K;
  for (int64_t k = 0; k < K; k += kOutputGroup) {
    int64_t row = 0;
    for (; row + kTogether <= N; row += kTogether) {
      share_of_rows<kTogether>(x + row * F, a.shape, block, constants, k, share + row * K);
    }
    for (; row < N; ++row) {
      share_of_rows<1>(x + row * F, a.shape, block, constants, k, share + row * K);
    }
  }
}

// Outputs whose shares are added side by side, so that reads are contiguous.
constexpr int64_t kStrip = 64;

// The outputs [first, first + count) of N * K: the bias and the blocks' shares, in their order.
template <typename T>
void combine(const BatchNormLinearForward& a, int64_t first, int64_t count) {
  using A = accumulate_t<T>;
  const int64_t K = a.shape.outputs;
  double sums[kStrip];
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = value_or(static_cast<const A*>(a.bias), (first + i) % K, 0.0);
  }
  const A* share = static_cast<const A*>(a.partials) + first;
  for (int64_t b = 0; b < feature_blocks(a.shape); ++b, share += a.shape.rows * K) {
    for (int64_t i = 0; i < count; ++i) sums[i] += share[i];
  }
  T* output = static_cast<T*>(a.output) + first;
  for (int64_t i = 0; i < count; ++i) output[i] = store<T>(static_cast<A>(sums[i]));
}

}  // namespace

void batch_norm_linear_blocks(DType dtype, const BatchNormLinearForward& a, int64_t begin,
                              int64_t end) {
  if (a.pixels.scale != nullptr) {
    for (int64_t i = begin; i < end; ++i) forward_block<uint8_t>(a, i);
    return;
  }
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t i = begin; i < end; ++i) forward_block<T>(a, i);
  });
}

void batch_norm_linear_combine(DType dtype, const BatchNormLinearForward& a, int64_t begin,
                               int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t i = begin; i < end; i += kStrip) combine<T>(a, i, smaller(kStrip, end - i));
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_linear_cpu(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
    double eps, const OptionalTensor& scale, const OptionalTensor& shift) {
  return batch_norm_linear_host(
      x, weight, bias, norm_weight, norm_bias, running_mean, running_var, training, eps, scale,
      shift, kFeatureBlock, [](const BatchNormLinearForward& call, const Tensor& x) {
        const int64_t grain = ceil_divide(kElementGrain, kFeatureBlock * call.shape.rows);
        parallel_for(feature_blocks(call.shape), grain, [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(batch_norm_linear_blocks)(dtype_of(x), call, begin, end);
        });
        parallel_for(call.shape.rows * call.shape.outputs,
                     ceil_divide(kElementGrain, feature_blocks(call.shape)),
                     [&](int64_t begin, int64_t end) {
                       SKINFAST_KERNEL(batch_norm_linear_combine)(dtype_of(x), call, begin, end);
                     });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("batch_norm_linear", TORCH_BOX(&batch_norm_linear_cpu));
}

}  // namespace skinfast
#endif
