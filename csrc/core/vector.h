// Vectors as wide as the instruction set that a CPU kernel is being compiled for, on the compiler's
// vector extensions: `a * b + c` and `load_vector` are all that most kernels need. Included inside
// CPU kernel files only; the namespace keeps one instruction set's code out of another's.
#pragma once

#include "core/scalar.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SKINFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SKINFAST_VECTOR_BYTES 32
#else
#define SKINFAST_VECTOR_BYTES 16
#endif

namespace skinfast::SKINFAST_ISA {

// A vector of accumulators: float or double lanes.
template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SKINFAST_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(SKINFAST_VECTOR_BYTES)));
};
template <typename A>
using vector_t = typename VectorOf<A>::type;

template <typename A>
constexpr int kLanes = SKINFAST_VECTOR_BYTES / static_cast<int>(sizeof(A));

// How many products one instruction adds to each lane's sum.
template <typename T>
constexpr int64_t kTerms = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int64_t kTerms<BFloat16> = 2;
#endif

SKINFAST_HOST_DEVICE vector_t<float> load_vector(const float* source) {
  vector_t<float> result;
  memcpy(&result, source, sizeof(result));
  return result;
}
SKINFAST_HOST_DEVICE vector_t<double> load_vector(const double* source) {
  vector_t<double> result;
  memcpy(&result, source, sizeof(result));
  return result;
}
SKINFAST_HOST_DEVICE vector_t<float> load_vector(const BFloat16* source) {
  typedef uint16_t Narrow __attribute__((vector_size(SKINFAST_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(SKINFAST_VECTOR_BYTES)));
  Narrow narrow;
  memcpy(&narrow, source, sizeof(narrow));
  const Wide wide = __builtin_convertvector(narrow, Wide) << 16;
  return reinterpret_cast<vector_t<float>>(wide);
}

SKINFAST_HOST_DEVICE vector_t<float> load_vector(const uint8_t* source) {
  typedef int32_t Words __attribute__((vector_size(SKINFAST_VECTOR_BYTES)));
  // Converted at once, GCC takes bytes apart one by one.
#if defined(__AVX512F__)
  const __m512i words =
      _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__AVX2__)
  const __m256i words =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
#else
  int32_t words[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) words[i] = source[i];
#endif
  Words integers;
  memcpy(&integers, &words, sizeof(integers));
  return __builtin_convertvector(integers, vector_t<float>);
}

SKINFAST_HOST_DEVICE void store_vector(float* target, vector_t<float> value) {
  memcpy(target, &value, sizeof(value));
}
SKINFAST_HOST_DEVICE void store_vector(double* target, vector_t<double> value) {
  memcpy(target, &value, sizeof(value));
}
SKINFAST_HOST_DEVICE void store_vector(BFloat16* target, vector_t<float> value) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh(value);
#else
  // Store<BFloat16>, lane by lane.
  typedef uint16_t Narrow __attribute__((vector_size(SKINFAST_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(SKINFAST_VECTOR_BYTES)));
  const Wide bits = reinterpret_cast<Wide>(value);
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide quiet = Wide{} + 0x7fc0u;
  const Narrow narrow = __builtin_convertvector(value != value ? quiet : rounded, Narrow);
#endif
  memcpy(target, &narrow, sizeof(narrow));
}

// The first `count` lanes; the rest are zero.
template <typename T>
SKINFAST_HOST_DEVICE vector_t<accumulate_t<T>> load_partial(const T* source, int count) {
  vector_t<accumulate_t<T>> result{};
  for (int i = 0; i < count; ++i) result[i] = load(source[i]);
  return result;
}
template <typename T>
SKINFAST_HOST_DEVICE void store_partial(T* target, vector_t<accumulate_t<T>> value, int count) {
  for (int i = 0; i < count; ++i) target[i] = store<T>(accumulate_t<T>(value[i]));
}

// The sum of the lanes, in order.
template <typename A, typename V>
SKINFAST_HOST_DEVICE A sum_lanes(V value) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += value[i];
  return sum;
}

}  // namespace skinfast::SKINFAST_ISA
