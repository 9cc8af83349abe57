// What normalises a range of elements, and its gradient; for kernel code only.
#pragma once

#include "batch_norm_relu/batch_norm_columns.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // one copy for each file: see core/isa.h

// Call body(i, column, count) for the pieces [i, i + count) of [begin, end) within one row each.
template <typename Body>
inline void for_each_piece(const BatchNormShape& shape, int64_t begin, int64_t end,
                           const Body& body) {
  int64_t column = begin % shape.columns;
  for (int64_t i = begin; i < end;) {
    const int64_t count = smaller(end - i, shape.columns - column);
    body(i, column, count);
    i += count;
    column = 0;
  }
}

// Pieces are functions of their own: __restrict holds for parameters, and only so do these loops,
// which write bytes and T, vectorise.
template <typename T, bool kResidual, bool kRelu, typename A = accumulate_t<T>>
void apply_piece(const T* __restrict x, const T* __restrict residual, const A* __restrict mean,
                 const A* __restrict scale, const A* __restrict shift, T* __restrict output,
                 int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    A value = normalized(load(x[k]), mean[k], scale[k], shift[k]);
    if (kResidual) value += load(residual[k]);
    if (kRelu) value = relu(value);
    output[k] = store<T>(value);
  }
}

// The elements [begin, end), at most kChunk of them, into `output`.
template <typename T, bool kResidual, bool kRelu>
void apply_range(const BatchNormForward& a, int64_t begin, int64_t end, T* output) {
  using A = accumulate_t<T>;
  A means[kChunk], scales[kChunk], shifts[kChunk];
  for_each_piece(a.shape, begin, end, [&](int64_t i, int64_t column, int64_t count) {
    const auto values = [&](const A* vector, A* buffer) {
      return per_column(vector, a.shape.group, column, count, buffer);
    };
    const A* coefficients = static_cast<const A*>(a.coefficients);
    apply_piece<T, kResidual, kRelu>(
        static_cast<const T*>(a.x) + i, kResidual ? static_cast<const T*>(a.residual) + i : nullptr,
        values(static_cast<const A*>(a.mean), means), values(coefficients, scales),
        values(coefficients + a.shape.channels, shifts), output + (i - begin), count);
  });
}

template <typename T, bool kTraining, bool kRelu, typename G, typename A = accumulate_t<T>>
void apply_backward_piece(const G* __restrict grad_output, const T* __restrict x,
                          const uint8_t* __restrict flags, const A* __restrict mean,
                          const A* __restrict scale, const A* __restrict slope,
                          const A* __restrict offset, T* __restrict grad_x, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const A above = load(grad_output[k]);
    const A grad = !kRelu || flags[k] != 0 ? above : A(0);
    grad_x[k] = store<T>(
        kTraining ? training_gradient(grad, load(x[k]), mean[k], scale[k], slope[k], offset[k])
                  : grad * scale[k]);
  }
}

// The elements [begin, end), at most kChunk of them, whose `grad_output` is stored in T or A.
template <typename T, bool kTraining, bool kRelu, typename G = T>
void apply_backward_range(const BatchNormBackward& a, const G* grad_output, int64_t begin,
                          int64_t end) {
  using A = accumulate_t<T>;
  A means[kChunk], scales[kChunk], slopes[kChunk], offsets[kChunk];
  uint8_t flags[kChunk];
  if (kRelu) unpack_mask(a.mask, begin, end - begin, flags);
  for_each_piece(a.shape, begin, end, [&](int64_t i, int64_t column, int64_t count) {
    const auto values = [&](const A* vector, A* buffer) {
      return per_column(vector, a.shape.group, column, count, buffer);
    };
    const A* coefficients = static_cast<const A*>(a.coefficients);
    apply_backward_piece<T, kTraining, kRelu>(
        grad_output + (i - begin), static_cast<const T*>(a.x) + i, flags + (i - begin),
        values(static_cast<const A*>(a.mean), means), values(coefficients, scales),
        values(coefficients + a.shape.channels, slopes),
        values(coefficients + 2 * a.shape.channels, offsets), static_cast<T*>(a.grad_x) + i, count);
  });
}

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
