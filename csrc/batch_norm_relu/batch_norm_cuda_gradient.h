// Elements eight at a time, and the gradient that batch norm's backward kernels read.
#pragma once

#include "core/cuda.h"

namespace skinfast {

constexpr int kEight = 8;

template <typename T>
struct Eight {
  T values[kEight];
};

// kVector: all 8 exist and are 16-byte aligned; else the first `count` of them exist.
template <bool kVector, typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from, int count) {
  Eight<T> eight{};
  if (kVector) {
    using V = Vector<T, kVectorWidth<T>>;
#pragma unroll
    for (int i = 0; i < kEight / kVectorWidth<T>; ++i) {
      const V part = reinterpret_cast<const V*>(from)[i];
#pragma unroll
      for (int k = 0; k < kVectorWidth<T>; ++k) {
        eight.values[i * kVectorWidth<T> + k] = part.values[k];
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (k < count) eight.values[k] = from[k];
    }
  }
  return eight;
}

template <bool kVector, typename T>
__device__ __forceinline__ void store_eight(T* to, const Eight<T>& eight, int count) {
  if (kVector) {
    using V = Vector<T, kVectorWidth<T>>;
#pragma unroll
    for (int i = 0; i < kEight / kVectorWidth<T>; ++i) {
      V part;
#pragma unroll
      for (int k = 0; k < kVectorWidth<T>; ++k) {
        part.values[k] = eight.values[i * kVectorWidth<T> + k];
      }
      reinterpret_cast<V*>(to)[i] = part;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if (k < count) to[k] = eight.values[k];
    }
  }
}

// The gradient behind the ReLU where that of its output is stored. T [rows, columns]
template <typename T>
struct StoredGradient {
  static constexpr int kResidents = 4, kInFlight = 2;  // see batch_norm_cuda_reduce.h

  const T* grad_output;
  const uint8_t* mask;  // null without ReLU

  // kWidth elements from `index`, a multiple of kWidth, so that their bits are within one byte.
  template <int kWidth>
  __device__ __forceinline__ Vector<T, kWidth> at(int64_t index) const {
    auto grad = *reinterpret_cast<const Vector<T, kWidth>*>(grad_output + index);
    const uint32_t bits =
        mask == nullptr ? 0xffu : static_cast<uint32_t>(mask[index / 8]) >> (index % 8);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if ((bits >> k & 1u) == 0) grad.values[k] = store<T>(accumulate_t<T>(0));
    }
    return grad;
  }

  // As load_eight, from `first`, a multiple of 8.
  template <bool kVector>
  __device__ __forceinline__ Eight<T> eight(int64_t first, int count) const {
    Eight<T> grad = load_eight<kVector>(grad_output + first, count);
    const uint32_t bits = mask == nullptr ? 0xffu : mask[first / 8];
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      if ((bits >> k & 1u) == 0) grad.values[k] = store<T>(accumulate_t<T>(0));
    }
    return grad;
  }
};

}  // namespace skinfast
