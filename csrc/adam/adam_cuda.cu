#include "adam/adam.h"

#include <limits>

#include "core/cuda.h"

namespace skinfast {
namespace {

// A kernel's parameters may take 4 KB. Tables passed in them need no device memory and no copy,
// so a CUDA graph records them with the launch.
constexpr size_t kParameterBytes = 4096;
constexpr int kStepsPerLaunch = 500;
constexpr int kTensorsPerLaunch = 56;
constexpr int kChunk = 4096;  // elements a block updates

struct StepTable {
  float* steps[kStepsPerLaunch];
  const float* found_inf;
  int count;
};
static_assert(sizeof(StepTable) <= kParameterBytes);

struct AdamTable {
  AdamTensor tensors[kTensorsPerLaunch];
  int first_block[kTensorsPerLaunch + 1];  // the first block of each tensor; then their number
  bool aligned[kTensorsPerLaunch];         // whether every pointer allows 16-byte accesses
  int count;
  AdamOptions options;
  double lr;
  const double* lr_tensor;
  const float* grad_scale;
  const float* found_inf;
};
static_assert(sizeof(AdamTable) <= kParameterBytes);

__device__ __forceinline__ bool skips(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

// A kernel of its own: the blocks of the update all read the step, in no order.
__global__ void advance_steps_kernel(StepTable table) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < table.count && !skips(table.found_inf)) *table.steps[i] += 1.0f;
}

// The elements [begin, end) of one parameter, kWidth an access.
template <bool kAmsgrad, int kWidth, typename T, typename G, typename A>
__device__ __forceinline__ void update(const AdamScalars<A>& s, const AdamTensor& tensor,
                                       int64_t begin, int64_t end) {
  using V = Vector<T, kWidth>;
  using Lower = Vector<G, kWidth>;
  T* param = static_cast<T*>(tensor.param);
  const G* grad = static_cast<const G*>(tensor.grad);
  G* copy = static_cast<G*>(tensor.copy);
  T* exp_avg = static_cast<T*>(tensor.exp_avg);
  T* exp_avg_sq = static_cast<T*>(tensor.exp_avg_sq);
  T* max_exp_avg_sq = static_cast<T*>(tensor.max_exp_avg_sq);

  const int64_t thread = threadIdx.x, threads = blockDim.x;
  const int64_t tail = end - (end - begin) % kWidth;
  for (int64_t i = begin + thread * kWidth; i < tail; i += threads * kWidth) {
    V p = *reinterpret_cast<const V*>(param + i);
    const Lower g = *reinterpret_cast<const Lower*>(grad + i);
    Lower c;
    V m = *reinterpret_cast<const V*>(exp_avg + i);
    V v = *reinterpret_cast<const V*>(exp_avg_sq + i);
    V largest;
    if constexpr (kAmsgrad) largest = *reinterpret_cast<const V*>(max_exp_avg_sq + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      adam_element<kAmsgrad>(s, p.values, g.values, c.values, m.values, v.values, largest.values,
                             k);
    }
    *reinterpret_cast<V*>(param + i) = p;
    if constexpr (!std::is_same_v<T, G>) *reinterpret_cast<Lower*>(copy + i) = c;
    *reinterpret_cast<V*>(exp_avg + i) = m;
    *reinterpret_cast<V*>(exp_avg_sq + i) = v;
    if constexpr (kAmsgrad) *reinterpret_cast<V*>(max_exp_avg_sq + i) = largest;
  }
  for (int64_t i = tail + thread; i < end; i += threads) {
    adam_element<kAmsgrad>(s, param, grad, copy, exp_avg, exp_avg_sq, max_exp_avg_sq, i);
  }
}

template <bool kAmsgrad, typename T, typename G>
__global__ void __launch_bounds__(kThreads) adam_kernel(AdamTable table) {
  using A = accumulate_t<T>;
  if (skips(table.found_inf)) return;

  // The tensor whose blocks include this one: the last that begins at or before it.
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= block ? low : high) = middle;
  }
  const AdamTensor& tensor = table.tensors[low];

  __shared__ AdamScalars<A> shared;
  if (threadIdx.x == 0) {  // two powers in double: once a block is enough
    const double lr = table.lr_tensor != nullptr ? *table.lr_tensor : table.lr;
    const double grad_scale = table.grad_scale != nullptr ? *table.grad_scale : 1.0;
    shared = rounded<A>(adam_scalars(table.options, lr, *tensor.step, grad_scale));
  }
  __syncthreads();
  const AdamScalars<A> s = shared;

  const int64_t begin = static_cast<int64_t>(block - table.first_block[low]) * kChunk;
  const int64_t end = begin + kChunk < tensor.count ? begin + kChunk : tensor.count;
  if (table.aligned[low]) {
    update<kAmsgrad, kVectorWidth<T>, T, G>(s, tensor, begin, end);
  } else {
    update<kAmsgrad, 1, T, G>(s, tensor, begin, end);
  }
}

void launch_steps(const AdamCall& call, cudaStream_t stream) {
  StepTable table{};
  table.found_inf = call.found_inf;
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    table.steps[table.count++] = call.tensors[i].step;
    if (table.count == kStepsPerLaunch || i + 1 == call.tensors.size()) {
      launch(&advance_steps_kernel, grid_for(table.count), kThreads, 0, stream, table);
      table.count = 0;
    }
  }
}

template <typename T, typename G>
void launch_kernel(const AdamCall& call, const AdamTable& table, cudaStream_t stream) {
  launch(call.amsgrad ? &adam_kernel<true, T, G> : &adam_kernel<false, T, G>,
         dim3(table.first_block[table.count]), kThreads, 0, stream, table);
}

void launch_update(const AdamCall& call, DType dtype, DType grad_dtype, AdamTable& table,
                   cudaStream_t stream) {
  if (table.first_block[table.count] > 0) {
    if (dtype == grad_dtype) {
      SKINFAST_CUDA_DISPATCH(dtype, T, { launch_kernel<T, T>(call, table, stream); });
    } else if (grad_dtype == DType::kBFloat16) {
      launch_kernel<float, BFloat16>(call, table, stream);
    } else {
      launch_kernel<float, Half>(call, table, stream);
    }
  }
  table.count = 0;
}

void adam_cuda(const AdamCall& call) {
  const DeviceGuard guard(call.first.get_device_index());
  const cudaStream_t stream = current_stream(call.first);
  launch_steps(call, stream);

  AdamTable table{};
  table.options = call.options;
  table.lr = call.lr;
  table.lr_tensor = call.lr_tensor;
  table.grad_scale = call.grad_scale;
  table.found_inf = call.found_inf;
  constexpr std::pair<DType, DType> kinds[] = {
      {DType::kFloat, DType::kFloat},       {DType::kFloat, DType::kBFloat16},
      {DType::kFloat, DType::kHalf},        {DType::kDouble, DType::kDouble},
      {DType::kBFloat16, DType::kBFloat16}, {DType::kHalf, DType::kHalf}};
  for (const auto& [dtype, grad_dtype] : kinds) {
    for (size_t i = 0; i < call.tensors.size(); ++i) {
      const AdamTensor& tensor = call.tensors[i];
      if (call.dtypes[i] != dtype || call.grad_dtypes[i] != grad_dtype) continue;
      if (tensor.count == 0) continue;
      const int64_t blocks = (tensor.count + kChunk - 1) / kChunk;
      if (table.count == kTensorsPerLaunch ||
          table.first_block[table.count] + blocks > std::numeric_limits<int>::max()) {
        launch_update(call, dtype, grad_dtype, table, stream);
      }
      const int slot = table.count++;
      table.tensors[slot] = tensor;
      table.aligned[slot] = is_aligned(tensor.param, tensor.grad, tensor.copy, tensor.exp_avg,
                                       tensor.exp_avg_sq, tensor.max_exp_avg_sq);
      table.first_block[slot + 1] = table.first_block[slot] + static_cast<int>(blocks);
    }
    launch_update(call, dtype, grad_dtype, table, stream);
  }
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) { m.impl("adam_", TORCH_BOX(&adam_host<&adam_cuda>)); }

}  // namespace skinfast
