#include "adam/adam.h"

namespace skinfast::SKINFAST_ISA {

template <bool kAmsgrad, typename T, typename G>
static void update(const AdamTensor& tensor, const AdamScalars<double>& scalars, int64_t begin,
                   int64_t end) {
  const AdamScalars<accumulate_t<T>> s = rounded<accumulate_t<T>>(scalars);
  T* __restrict param = static_cast<T*>(tensor.param);
  const G* __restrict grad = static_cast<const G*>(tensor.grad);
  G* __restrict copy = static_cast<G*>(tensor.copy);
  T* __restrict exp_avg = static_cast<T*>(tensor.exp_avg);
  T* __restrict exp_avg_sq = static_cast<T*>(tensor.exp_avg_sq);
  T* __restrict max_exp_avg_sq = static_cast<T*>(tensor.max_exp_avg_sq);
  for (int64_t i = begin; i < end; ++i) {
    adam_element<kAmsgrad>(s, param, grad, copy, exp_avg, exp_avg_sq, max_exp_avg_sq, i);
  }
}

template <typename T, typename G>
static void update(const AdamTensor& tensor, const AdamScalars<double>& scalars, int64_t begin,
                   int64_t end) {
  if (tensor.max_exp_avg_sq != nullptr) {
    update<true, T, G>(tensor, scalars, begin, end);
  } else {
    update<false, T, G>(tensor, scalars, begin, end);
  }
}

void adam(DType dtype, DType grad_dtype, const AdamTensor& tensor,
          const AdamScalars<double>& scalars, int64_t begin, int64_t end) {
  if (dtype != grad_dtype) return update<float, BFloat16>(tensor, scalars, begin, end);
  SKINFAST_CPU_DISPATCH(dtype, T, { update<T, T>(tensor, scalars, begin, end); });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

// Threads share a parameter in whole chunks, so that no two write one cache line and vectors start
// at the same elements for any number of threads.
constexpr int64_t kChunk = 1024;

int64_t chunk_end(int64_t element, int64_t count) {
  return std::min(count, (std::max<int64_t>(element, 0) + kChunk - 1) / kChunk * kChunk);
}

void adam_cpu(const AdamCall& call) {
  if (call.found_inf != nullptr && *call.found_inf != 0) return;
  const double lr = call.lr_tensor != nullptr ? *call.lr_tensor : call.lr;
  const double grad_scale = call.grad_scale != nullptr ? *call.grad_scale : 1.0;

  // The parameters end to end: parameter i begins at element first[i] of the whole.
  std::vector<int64_t> first;
  std::vector<AdamScalars<double>> scalars;
  int64_t total = 0;
  for (const AdamTensor& tensor : call.tensors) {
    *tensor.step += 1;
    scalars.push_back(adam_scalars(call.options, lr, *tensor.step, grad_scale));
    first.push_back(total);
    total += tensor.count;
  }
  // A thread updates the chunks that begin in its range.
  parallel_for(total, kElementGrain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < call.tensors.size(); ++i) {
      const AdamTensor& tensor = call.tensors[i];
      const int64_t from = chunk_end(begin - first[i], tensor.count);
      const int64_t to = chunk_end(end - first[i], tensor.count);
      if (from < to) {
        SKINFAST_KERNEL(adam)
        (call.dtypes[i], call.grad_dtypes[i], tensor, scalars[i], from, to);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) { m.impl("adam_", TORCH_BOX(&adam_host<&adam_cpu>)); }

}  // namespace skinfast
#endif
