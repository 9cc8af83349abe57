// Small kernels with known results, and kernels with known mistakes, for test_emulation_itself.py.
// Each is called from Python by name; the result is what went wrong, or null.
#include <stdexcept>
#include <string>

#include "emulation.h"

namespace {

using skinfast::launch;

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int linear_thread() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

// --- right, or wrong where asked for
// ------------------------------------------------------------------------------------

// out[k]: what lane after lane gets from each kind of shuffle; then from the votes.
__global__ void shuffles_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[0 * 32 + lane] = __shfl_sync(kAll, lane, 5);
  out[1 * 32 + lane] = __shfl_up_sync(kAll, lane, 3);
  out[2 * 32 + lane] = __shfl_down_sync(kAll, lane, 3);
  out[3 * 32 + lane] = __shfl_xor_sync(kAll, lane, 16);
  out[4 * 32 + lane] = __shfl_down_sync(kAll, lane, 1, 8);
  out[5 * 32 + lane] = __shfl_sync(kAll, lane, 9, 8);
  out[6 * 32 + lane] = static_cast<int>(__shfl_xor_sync(kAll, lane + 0.5, 1) * 2);
  out[7 * 32 + lane] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[8 * 32 + lane] = __any_sync(kAll, lane == 31) * 2 + __all_sync(kAll, lane < 31);
}

// Two halves of a warp, each among itself, in different branches.
__global__ void divided_warp_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000ffffu, lane, 15);
  } else {
    out[lane] = __shfl_xor_sync(0xffff0000u, lane, 1);
  }
}

// Threads beyond `count` leave before the barrier; the others reverse `out` in shared memory.
__global__ void early_exit_kernel(int* out, int count) {
  SKINFAST_DYNAMIC_SHARED(int, shared);
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  shared[i] = out[i];
  __syncthreads();
  out[i] = shared[count - 1 - i];
}

__global__ void indices_kernel(int* out) {
  const int block =
      static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  out[block * threads + linear_thread()] =
      static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x +
                       10000 * blockIdx.y + 100000 * blockIdx.z);
}

// The sum of the elements of each block of 128, by shuffles and one shared value a warp.
__global__ void __launch_bounds__(128) block_sum_kernel(const float* x, float* out, bool barrier) {
  __shared__ float partial[4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = x[blockIdx.x * 128 + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAll, sum, step);
  if (lane == 0) partial[warp] = sum;
  if (barrier) __syncthreads();  // planted: without it
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}

// The sum of 256 elements by a tree in shared memory.
__global__ void tree_kernel(const float* x, float* out, bool barrier) {
  SKINFAST_DYNAMIC_SHARED(float, sums);
  const int i = static_cast<int>(threadIdx.x);
  sums[i] = x[i];
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (barrier) __syncthreads();  // planted: without it
    if (i < half) sums[i] += sums[i + half];
  }
  if (i == 0) *out = sums[0];
}

// --- wrong ------------------------------------------------------------------------------------

__global__ void unwritten_shared_kernel(float* out) {
  __shared__ float fixed[32];
  SKINFAST_DYNAMIC_SHARED(float, dynamic);
  if (threadIdx.x != 7) fixed[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = fixed[threadIdx.x];
  out[32 + threadIdx.x] = dynamic[threadIdx.x];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_from_exited_kernel(int* out) {
  if (threadIdx.x == 4) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}

__global__ void shuffle_without_self_kernel(int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 0);
}

__global__ void lane_that_never_comes_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  __syncthreads();
}

__global__ void copy_kernel(const float* x, float* out, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= count) out[i] = x[i];  // planted: <= for <
}

__global__ void shared_overflow_kernel(float* out, bool fixed) {
  __shared__ float values[32];
  SKINFAST_DYNAMIC_SHARED(float, dynamic);
  float* const shared = fixed ? values : dynamic;
  shared[threadIdx.x + 1] = 1.0f;  // planted: + 1
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

struct alignas(16) Vector {
  float values[4];
};

__global__ void misaligned_kernel(const float* x, float* out) {
  const Vector v = reinterpret_cast<const Vector*>(x + 1)[threadIdx.x];  // planted: + 1
  out[threadIdx.x] = v.values[0];
}

__global__ void nothing_kernel() {}

#if defined(PLANTED_ATOMIC)
template <typename T>
__global__ void atomic_kernel(T* out) {
  atomicAdd(out, T(1));
}
#endif

template <typename Launches>
const char* message_of(const Launches& launches) {
  static std::string message;
  try {
    launches();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

// A function of this library for Python: its launches, and the message of what they throw.
#define PLANTED(name, parameters, ...)                                            \
  extern "C" __attribute__((visibility("default"))) const char* name parameters { \
    return message_of([&] { __VA_ARGS__; });                                      \
  }

PLANTED(shuffles, (int* out), launch(&shuffles_kernel, 1, 32, 0, nullptr, out))
PLANTED(divided_warp, (int* out), launch(&divided_warp_kernel, 1, 32, 0, nullptr, out))
PLANTED(early_exit, (int* out, int count),
        launch(&early_exit_kernel, 1, 64, count * sizeof(int), nullptr, out, count))
PLANTED(indices, (int* out), launch(&indices_kernel, dim3(2, 3, 2), dim3(5, 4, 3), 0, nullptr, out))
PLANTED(block_sum, (const float* x, float* out, int blocks, bool barrier),
        launch(&block_sum_kernel, dim3(blocks), 128, 0, nullptr, x, out, barrier))
PLANTED(tree, (const float* x, float* out, bool barrier),
        launch(&tree_kernel, 1, 256, 256 * sizeof(float), nullptr, x, out, barrier))
PLANTED(unwritten_shared, (float* out),
        launch(&unwritten_shared_kernel, 1, 32, 32 * sizeof(float), nullptr, out))
PLANTED(divergent_barrier, (), launch(&divergent_barrier_kernel, 1, 64, 0, nullptr))
PLANTED(shuffle_from_exited, (int* out),
        launch(&shuffle_from_exited_kernel, 1, 32, 0, nullptr, out))
PLANTED(shuffle_beyond_block, (int* out),
        launch(&shuffle_from_exited_kernel, 1, 3, 0, nullptr, out))
PLANTED(shuffle_without_self, (int* out),
        launch(&shuffle_without_self_kernel, 1, 32, 0, nullptr, out))
PLANTED(lane_that_never_comes, (int* out),
        launch(&lane_that_never_comes_kernel, 1, 32, 0, nullptr, out))
PLANTED(off_by_one, (const float* x, float* out, int count),
        launch(&copy_kernel, 2, 64, 0, nullptr, x, out, count))
PLANTED(shared_overflow, (float* out, bool fixed),
        launch(&shared_overflow_kernel, 1, 32, 32 * sizeof(float), nullptr, out, fixed))
PLANTED(misaligned, (const float* x, float* out),
        launch(&misaligned_kernel, 1, 2, 0, nullptr, x, out))
PLANTED(nothing, (int grid, int block, int shared_bytes),
        launch(&nothing_kernel, dim3(grid), dim3(block), shared_bytes, nullptr))
PLANTED(much_shared, (int shared_bytes), {
  cudaFuncSetAttribute(&nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  launch(&nothing_kernel, 1, 1, shared_bytes, nullptr);
})
