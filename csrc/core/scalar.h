// Storage types and their arithmetic, the same lines on the host and on the device.
// Depends on nothing but the compiler, so that kernels compiled for one instruction set cannot
// share inline functions with code compiled for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SKINFAST_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define SKINFAST_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace skinfast {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that sums and products of T are computed in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

SKINFAST_HOST_DEVICE float load(float value) { return value; }
SKINFAST_HOST_DEVICE double load(double value) { return value; }
SKINFAST_HOST_DEVICE float load(uint8_t value) { return static_cast<float>(value); }

SKINFAST_HOST_DEVICE float load(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// float16 is for CUDA alone, and for its emulation: older compilers for the CPU lack the type.
#if defined(__CUDACC__)
SKINFAST_HOST_DEVICE float load(Half value) { return __half2float(__ushort_as_half(value.bits)); }
#elif defined(SKINFAST_EMULATION)
SKINFAST_HOST_DEVICE float load(Half value) {
  _Float16 half;
  memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
}
#endif

// Convert a computed value to storage, rounding to nearest even; NaN stays NaN.
template <typename T>
struct Store;

template <>
struct Store<float> {
  SKINFAST_HOST_DEVICE float from(float value) { return value; }
};
template <>
struct Store<double> {
  SKINFAST_HOST_DEVICE double from(double value) { return value; }
};
template <>
struct Store<BFloat16> {
  SKINFAST_HOST_DEVICE BFloat16 from(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    // Rounding could carry a NaN's payload into the sign bit, so NaN is written out.
    return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded >> 16)};
#endif
  }
};
#if defined(__CUDACC__)
template <>
struct Store<Half> {
  SKINFAST_HOST_DEVICE Half from(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
};
#elif defined(SKINFAST_EMULATION)
template <>
struct Store<Half> {
  SKINFAST_HOST_DEVICE Half from(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    Half result;
    memcpy(&result.bits, &half, sizeof(half));
    return result;
  }
};
#endif

template <typename T, typename A>
SKINFAST_HOST_DEVICE T store(A value) {
  return Store<T>::from(value);
}

// a * b rounded, never the first half of a fused multiply-add, whose other rounding would make the
// backends differ. On the CPU a compiler flag sees to it (CMakeLists.txt).
SKINFAST_HOST_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SKINFAST_HOST_DEVICE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace skinfast
