// Launching CUDA kernels: the stream, the grid, one wrapper for every launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/scalar.h"
#include "core/tensor.h"

#if defined(SKINFAST_EMULATION)
#include "emulation.h"  // tests/emulation: the execution model on the CPU
#else
#include <cuda_runtime.h>

// An op's CUDA registration: SKINFAST_CUDA_LIBRARY_IMPL(m) { m.impl("x", TORCH_BOX(&x_cuda)); }
#define SKINFAST_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(skinfast, CUDA, m)

// The block's dynamic shared memory, 16-byte aligned, as `type name[]`.
#define SKINFAST_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)

namespace skinfast {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Every kernel is launched here, never by a bare <<<>>>, so that none goes unchecked.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace skinfast
#endif

namespace skinfast {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;

// Blocks for a grid-stride loop over `count` items: enough to fill any present GPU several times,
// few enough that the loop amortises a block's start.
inline dim3 grid_for(int64_t count, int threads = kThreads) {
  constexpr int64_t kMaxBlocks = 132 * 16;
  return dim3(static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>((count + threads - 1) / threads, kMaxBlocks))));
}

// N values of T that move through memory as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <typename T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// Whether a pointer may be accessed 16 bytes at a time: views can start anywhere.
template <typename... Pointers>
bool is_aligned(Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

#define SKINFAST_CUDA_DISPATCH(dtype, T, ...) \
  do {                                        \
    switch (dtype) {                          \
      case ::skinfast::DType::kFloat: {       \
        using T = float;                      \
        __VA_ARGS__                           \
      } break;                                \
      case ::skinfast::DType::kDouble: {      \
        using T = double;                     \
        __VA_ARGS__                           \
      } break;                                \
      case ::skinfast::DType::kBFloat16: {    \
        using T = ::skinfast::BFloat16;       \
        __VA_ARGS__                           \
      } break;                                \
      case ::skinfast::DType::kHalf: {        \
        using T = ::skinfast::Half;           \
        __VA_ARGS__                           \
      } break;                                \
    }                                         \
  } while (false)

}  // namespace skinfast
