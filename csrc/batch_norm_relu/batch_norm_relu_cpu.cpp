// The passes of batch_norm_relu that write, and its host functions.
#include "batch_norm_relu/batch_norm_ranges.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// The mask of at most kChunk outputs. A loop of its own over flags of 0 or 1, since comparisons
// beside relu() become branches; then 8 flags at a time into bits: the product moves flag k to bit
// 56 + k, and nothing carries.
template <typename T>
void write_mask(const T* __restrict output, int64_t count, uint8_t* __restrict mask) {
  uint8_t flags[kChunk];
  for (int64_t i = 0; i < count; ++i) flags[i] = relu_passes(load(output[i]));
  for (int64_t i = count; i % 8 != 0; ++i) flags[i] = 0;
  for (int64_t i = 0; i < ceil_divide(count, 8); ++i) {
    uint64_t eight;
    memcpy(&eight, flags + 8 * i, 8);
    mask[i] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

template <typename T, bool kResidual, bool kRelu>
void apply_chunk(const BatchNormForward& a, int64_t begin, int64_t end) {
  T* output = static_cast<T*>(a.output) + begin;
  apply_range<T, kResidual, kRelu>(a, begin, end, output);
  if (kRelu) write_mask(output, end - begin, a.mask + begin / 8);
}

template <typename T, bool kTraining>
void apply_backward_chunk(const BatchNormBackward& a, int64_t begin, int64_t end) {
  if (a.grad_residual != nullptr) {  // written by the reduction: the gradient behind the ReLU
    const T* grad_residual = static_cast<const T*>(a.grad_residual) + begin;
    apply_backward_range<T, kTraining, false>(a, grad_residual, begin, end);
    return;
  }
  const T* grad_output = static_cast<const T*>(a.grad_output) + begin;
  if (a.mask != nullptr) {
    apply_backward_range<T, kTraining, true>(a, grad_output, begin, end);
  } else {
    apply_backward_range<T, kTraining, false>(a, grad_output, begin, end);
  }
}

}  // namespace

void batch_norm_apply(DType dtype, const BatchNormForward& a, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto apply = a.residual != nullptr ? &apply_chunk<T, true, true>
                       : a.mask != nullptr   ? &apply_chunk<T, false, true>
                                             : &apply_chunk<T, false, false>;
    for (int64_t i = begin; i < end; i += kChunk) apply(a, i, smaller(i + kChunk, end));
  });
}

void batch_norm_apply_backward(DType dtype, const BatchNormBackward& a, int64_t begin,
                               int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto apply =
        a.training ? &apply_backward_chunk<T, true> : &apply_backward_chunk<T, false>;
    for (int64_t i = begin; i < end; i += kChunk) apply(a, i, smaller(i + kChunk, end));
  });
}

void batch_norm_spread(DType dtype, const BatchNormShape& shape, const void* values, int64_t planes,
                       void* columns) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    A* column = static_cast<A*>(columns);
    for (int64_t i = 0; i < planes * shape.channels; ++i) {
      const A value = static_cast<const A*>(values)[i];
      for (int64_t k = 0; k < shape.group; ++k) *column++ = value;
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "batch_norm_relu/batch_norm_cpu_host.h"

namespace skinfast {
namespace {

// Up to this many pixels a map, and from this many rows, a channel is spread over its columns.
constexpr int64_t kSmallMap = 32;

// values [planes, C], each channel's value repeated for its columns: [planes, columns]
Tensor spread(const BatchNormShape& shape, const Tensor& x, const void* values, int64_t planes) {
  const Tensor columns = new_vector(x, planes * shape.group);
  SKINFAST_KERNEL(batch_norm_spread)
  (dtype_of(x), shape, values, planes, columns.mutable_data_ptr());
  return columns;
}

// call.coefficients are [planes, C].
template <typename Call, typename Kernel>
void apply_chunks(Call call, const Tensor& x, int64_t planes, Kernel apply) {
  const BatchNormShape shape = call.shape;
  OptionalTensor mean, coefficients;
  // Maps of a few pixels would have the kernel look up a channel for every few elements: there,
  // where the rows are many enough to pay for it, each column becomes a channel of its own.
  if (shape.group > 1 && shape.group <= kSmallMap && shape.rows >= kSmallMap) {
    mean = spread(shape, x, call.mean, 1);
    coefficients = spread(shape, x, call.coefficients, planes);
    call.mean = mean->mutable_data_ptr();
    call.coefficients = coefficients->mutable_data_ptr();
    call.shape = {shape.rows, shape.columns, shape.columns, 1};
  }
  parallel_for(ceil_divide(x.numel(), kChunk), kElementGrain / kChunk,
               [&](int64_t begin, int64_t end) {
                 apply(dtype_of(x), call, begin * kChunk, std::min(end * kChunk, x.numel()));
               });
}

FourTensors batch_norm_relu_cpu(const Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var, bool training, double eps,
                                bool relu, const OptionalTensor& statistics) {
  return batch_norm_forward_cpu({"batch_norm_relu", x, std::nullopt, weight, bias, running_mean,
                                 running_var, training, eps, relu, statistics});
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward_cpu(
    const Tensor& grad_output, const Tensor& x, const Tensor& mask, const Tensor& mean,
    const Tensor& variance, const OptionalTensor& weight, bool training, double eps,
    bool needs_grad_x) {
  const auto [grad_x, grad_residual, grad_weight, grad_bias] =
      batch_norm_backward_cpu({"batch_norm_relu_backward", grad_output, x, mask, mean, variance,
                               weight, training, eps, needs_grad_x, false});
  return {grad_x, grad_weight, grad_bias};
}

template <typename T>
void update_statistic(const Tensor& running, const Tensor& batch, double factor, double momentum) {
  using A = accumulate_t<T>;
  T* __restrict pr = static_cast<T*>(running.mutable_data_ptr());
  const A* __restrict pb = static_cast<const A*>(batch.const_data_ptr());
  const A f = static_cast<A>(factor), m = static_cast<A>(momentum);
  const int64_t count = running.numel(), stride = running.stride(0);
  if (stride == 1) {  // whole vectors
    for (int64_t c = 0; c < count; ++c) pr[c] = updated_statistic(pr[c], pb[c] * f, m);
  } else {
    for (int64_t c = 0; c < count; ++c) {
      pr[c * stride] = updated_statistic(pr[c * stride], pb[c] * f, m);
    }
  }
}

void batch_norm_update_cpu(const Tensor& running_mean, const Tensor& running_var,
                           const Tensor& mean, const Tensor& variance, int64_t count,
                           double momentum) {
  batch_norm_update_host(
      running_mean, running_var, mean, variance, count,
      [&](const Tensor& batch_mean, const Tensor& batch_variance, double unbiased) {
        SKINFAST_CPU_DISPATCH(dtype_of(running_mean), T, {
          update_statistic<T>(running_mean, batch_mean, 1.0, momentum);
          update_statistic<T>(running_var, batch_variance, unbiased, momentum);
        });
      });
}

}  // namespace

FourTensors batch_norm_forward_cpu(const BatchNormInputs& inputs) {
  return batch_norm_forward_host(inputs, [](BatchNormForward& call, const Tensor& x) {
    const Tensor partials = new_partials(call.shape, x, 3);
    call.partials = partials.mutable_data_ptr();
    if (call.training) reduce_tiles(call, x, SKINFAST_KERNEL(batch_norm_reduce));
    combine_tiles(call, x, SKINFAST_KERNEL(batch_norm_combine));
    apply_chunks(call, x, 2, SKINFAST_KERNEL(batch_norm_apply));
  });
}

FourTensors batch_norm_backward_cpu(const BatchNormBackwardInputs& inputs) {
  return batch_norm_backward_host(inputs, [](BatchNormBackward& call, const Tensor& x) {
    const Tensor partials = new_partials(call.shape, x, 2);
    call.partials = partials.mutable_data_ptr();
    reduce_tiles(call, x, SKINFAST_KERNEL(batch_norm_reduce_backward));
    combine_tiles(call, x, SKINFAST_KERNEL(batch_norm_combine_backward));
    if (call.grad_x == nullptr) return;
    apply_chunks(call, x, 3, SKINFAST_KERNEL(batch_norm_apply_backward));
  });
}

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu_cpu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward_cpu));
  m.impl("batch_norm_update_", TORCH_BOX(&batch_norm_update_cpu));
}

}  // namespace skinfast
#endif
