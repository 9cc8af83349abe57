// The CUDA execution model on the CPU, so that the hand-written kernels run in tests on every
// machine: g++ compiles the .cu files as they are, with this header for <cuda_runtime.h>.
//
// Modelled: a fiber per thread of a block, blocks one at a time; shared memory; __syncthreads,
// __syncwarp, warp shuffles, ballots and votes; the limits of a launch. What CUDA leaves open is
// left open here too: the order of blocks, warps and lanes is drawn anew for each launch from
// SKINFAST_EMULATION_SEED, and shared memory starts as garbage that depends on it (0xff, a NaN in
// every format, for an even seed). A kernel whose result depends on the seed has a race, lacks a
// barrier or reads shared memory that it never wrote.
//
// An error, thrown from `launch`: a barrier or warp operation that its threads reach at different
// lines or never reach together, unless the missing ones have exited (sm_70 and later do not wait
// for those); a shuffle from a lane that exited or takes no part; a launch beyond CUDA's limits.
//
// With SKINFAST_EMULATION_DRY set, a launch is checked and counted but not run: host code can be
// asked about tensors that no memory could hold.
//
// Refused, by failing to compile: atomics and fences (`GCC poison` below), and anything else that
// is not declared here: PTX, cooperative groups, textures, tensor cores.
//
// Not modelled: memory ordering between threads, accesses torn between barriers (a thread runs
// from one barrier to the next undisturbed), lock-step execution of a warp, the rounding of nvcc's
// fused multiply-adds, speed. In the plain build static __shared__ arrays are one thread-local
// segment, which makes them easy to fill with garbage; under AddressSanitizer they are ordinary
// statics, which it puts guards between, but which keep what the last block left.
//
// A result obtained here is an emulated result. It never counts as a result of a GPU.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#if !defined(__GNUC__) || defined(__CUDACC__)
#error "emulation.h is for g++ alone"
#endif

// --- the words of CUDA C++ -------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs at present; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- barriers and warp operations --------------------------------------------------------------

namespace emulation {

using Where = std::source_location;

// What a thread brings to a meeting of its warp, and takes from it.
struct WarpValue {
  uint64_t value;     // the calling lane's own
  int source;         // the lane whose value it takes
  uint64_t received;  // that value
  unsigned ballot;    // the participating lanes whose value is not 0
};

// Suspend the calling thread until the threads that it must meet have all come.
void meet_block(const char* what, Where where);
WarpValue meet_warp(const char* what, Where where, unsigned mask, uint64_t value, int source);
int lane();

void* dynamic_shared();
void allow_dynamic_shared(const void* kernel, size_t bytes);
// Run `thread` once for every thread of the grid.
void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& thread);

template <typename T>
concept Shuffled = std::is_arithmetic_v<T>;

template <Shuffled T>
T shuffle(const char* what, Where where, unsigned mask, T value, int source) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(what, where, mask, bits, source).received;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::meet_block("__syncthreads", where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulation::Where where = emulation::Where::current()) {
  emulation::meet_warp("__syncwarp", where, mask, 0, emulation::lane());
}

// In all four, `width` lanes (a power of two) form a group, and a lane that would read beyond the
// group's end reads its own value.
template <emulation::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulation::Where where = emulation::Where::current()) {
  const int group = emulation::lane() & ~(width - 1);
  return emulation::shuffle("__shfl_sync", where, mask, value, group | (source & (width - 1)));
}

template <emulation::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane();
  const bool inside = static_cast<unsigned>(lane & (width - 1)) >= delta;
  return emulation::shuffle("__shfl_up_sync", where, mask, value,
                            inside ? lane - static_cast<int>(delta) : lane);
}

template <emulation::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane();
  const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
  return emulation::shuffle("__shfl_down_sync", where, mask, value,
                            inside ? lane + static_cast<int>(delta) : lane);
}

template <emulation::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::lane();
  const int source = lane ^ lane_mask;
  return emulation::shuffle("__shfl_xor_sync", where, mask, value,
                            source <= (lane | (width - 1)) ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Where where = emulation::Where::current()) {
  return emulation::meet_warp("__ballot_sync", where, mask, predicate != 0, emulation::lane())
      .ballot;
}

inline int __any_sync(unsigned mask, int predicate,
                      emulation::Where where = emulation::Where::current()) {
  return emulation::meet_warp("__any_sync", where, mask, predicate != 0, emulation::lane())
             .ballot != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      emulation::Where where = emulation::Where::current()) {
  return emulation::meet_warp("__all_sync", where, mask, predicate == 0, emulation::lane())
             .ballot == 0;
}

// --- device functions that are no part of C++ ----------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <std::integral T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <std::integral T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

#pragma GCC poison atomicAdd atomicSub atomicExch atomicMin atomicMax atomicInc atomicDec atomicCAS atomicAnd atomicOr atomicXor __threadfence __threadfence_block __threadfence_system __activemask

// --- the host's side -----------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  emulation::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

#undef STD_CUDA_CHECK  // torch's, which asks its CUDA library for the message
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(...) static_cast<void>(__VA_ARGS__)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

#define SKINFAST_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(skinfast_emulated, CPU, m)
#define SKINFAST_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::emulation::dynamic_shared())

namespace skinfast {

struct DeviceGuard {
  explicit DeviceGuard(int64_t) {}
};

template <typename Tensor>
cudaStream_t current_stream(const Tensor&) {
  return nullptr;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  emulation::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                      [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace skinfast
