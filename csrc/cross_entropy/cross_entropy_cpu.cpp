#include "cross_entropy/cross_entropy.h"

#include "core/lanes.h"

namespace skinfast::SKINFAST_ISA {
namespace {

// A count or a position of classes in lanes: at most kLaneBlock, which no lane reaches.
template <typename A>
SKINFAST_HOST_DEVICE integer_for<A> in_lanes(int64_t classes) {
  return static_cast<integer_for<A>>(classes < kLaneBlock ? classes : kLaneBlock);
}

// e^x to 2 units in the last place for x <= 0, without a branch, so that it vectorises; below
// -87.3, where e^x is under the smallest normal float, 0. NaN stays NaN.
SKINFAST_HOST_DEVICE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.3f ? -87.3f : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, in two steps
  float series = 1.9875691500e-4f;
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  series = series * r * r + r + 1.0f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  // n stands in the low bits of `shifted`; 2^n has it, plus the bias, as its exponent.
  const uint32_t power_bits = (static_cast<uint32_t>(bits) + 127u) << 23;
  float power;
  memcpy(&power, &power_bits, sizeof(power));
  return x < -87.3f ? 0.0f : series * power;
}

SKINFAST_HOST_DEVICE double exponential(double x) { return ::exp(x); }
SKINFAST_HOST_DEVICE float logarithm(float x) { return ::logf(x); }
SKINFAST_HOST_DEVICE double logarithm(double x) { return ::log(x); }

// Where to read kLaneBlock values from for `from`: there, with what follows the row, which the
// caller masks; from a copy where the tensor ends before.
template <typename T>
SKINFAST_HOST_DEVICE const T* readable(const T* from, const T* end, T* copy) {
  if (end - from >= kLaneBlock) return from;
  for (int64_t i = 0; i < kLaneBlock; ++i) copy[i] = from + i < end ? from[i] : T();
  return copy;
}

// The lanes combined into one, halves at a time.
template <typename A, typename Combine>
SKINFAST_HOST_DEVICE A across_lanes(A* lanes, const Combine& combine) {
#pragma GCC unroll 4
  for (int half = kLaneBlock / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <typename T, typename A>
SKINFAST_HOST_DEVICE Normalizer<A> normalizer_of(const T* row, const T* end, int64_t classes) {
  const auto larger = [](A a, A b) { return a > b ? a : b; };
  const A lowest = -static_cast<A>(__builtin_huge_val());
  T copy[kLaneBlock];
  A lanes[kLaneBlock];
  SKINFAST_FOR_LANES(i, kLaneBlock) lanes[i] = lowest;
  for (int64_t c = 0; c < classes; c += kLaneBlock) {
    const T* __restrict in = readable(row + c, end, copy);
    const integer_for<A> count = in_lanes<A>(classes - c);
    SKINFAST_FOR_LANES(i, kLaneBlock) lanes[i] = larger(i < count ? load(in[i]) : lowest, lanes[i]);
  }
  const A maximum = across_lanes(lanes, larger);

  SKINFAST_FOR_LANES(i, kLaneBlock) lanes[i] = A(0);
  for (int64_t c = 0; c < classes; c += kLaneBlock) {
    const T* __restrict in = readable(row + c, end, copy);
    const integer_for<A> count = in_lanes<A>(classes - c);
    // A row of minus infinities alone is NaN throughout, as in torch.
    SKINFAST_FOR_LANES(i, kLaneBlock) {
      const A value = exponential(load(in[i]) - maximum);
      lanes[i] += i < count ? value : A(0);
    }
  }
  return {maximum, logarithm(across_lanes(lanes, [](A a, A b) { return a + b; }))};
}

// The weights of a row's classes from `c` on; `copy` holds ones where there are no weights.
template <typename T>
SKINFAST_HOST_DEVICE const T* weights_from(const T* weight, int64_t c, int64_t classes, T* copy) {
  return weight == nullptr ? copy : readable(weight + c, weight + classes, copy);
}

// sum_c w_c (-log p_c)
template <typename T, typename A>
SKINFAST_HOST_DEVICE A smooth_loss(const T* row, const T* end, const T* weight,
                                   const Normalizer<A>& normalizer, int64_t classes) {
  T copy[kLaneBlock], weight_copy[kLaneBlock];
  A lanes[kLaneBlock];
  SKINFAST_FOR_LANES(i, kLaneBlock) weight_copy[i] = store<T>(A(1));
  SKINFAST_FOR_LANES(i, kLaneBlock) lanes[i] = A(0);
  for (int64_t c = 0; c < classes; c += kLaneBlock) {
    const T* __restrict in = readable(row + c, end, copy);
    const T* __restrict w = weights_from(weight, c, classes, weight_copy);
    const integer_for<A> count = in_lanes<A>(classes - c);
    SKINFAST_FOR_LANES(i, kLaneBlock) {
      const A value = load(w[i]) * log_probability(load(in[i]), normalizer);
      lanes[i] -= i < count ? value : A(0);
    }
  }
  return across_lanes(lanes, [](A a, A b) { return a + b; });
}

template <typename T>
void forward(const T* input, const int64_t* target, const T* weight, T* losses,
             Normalizer<accumulate_t<T>>* normalizers, LossSum* sums, const CrossEntropyParams& p,
             int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* input_end = input + p.rows * p.classes;
  for (int64_t block = begin; block < end; ++block) {
    LossSum sum = {0, 0};
    const int64_t first = block * kBlockRows;
    const int64_t last = first + kBlockRows < p.rows ? first + kBlockRows : p.rows;
    for (int64_t n = first; n < last; ++n) {
      const T* row = input + n * p.classes;
      const Normalizer<A> normalizer = normalizer_of<T, A>(row, input_end, p.classes);
      normalizers[n] = normalizer;
      A loss = A(0);
      if (target[n] != p.ignore_index) {
        const A w = weight == nullptr ? A(1) : load(weight[target[n]]);
        const A smooth = p.label_smoothing == 0
                             ? A(0)
                             : smooth_loss(row, input_end, weight, normalizer, p.classes);
        loss = row_loss(log_probability(load(row[target[n]]), normalizer), w, smooth, p);
        sum.loss += loss;
        sum.weight += w;
      }
      if (losses != nullptr) losses[n] = store<T>(loss);
    }
    sums[block] = sum;
  }
}

template <typename T>
void backward(const T* grad_loss, const T* input, const int64_t* target, const T* weight,
              const Normalizer<accumulate_t<T>>* normalizers, accumulate_t<T> total_weight, T* grad,
              const CrossEntropyParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* input_end = input + p.rows * p.classes;
  const T* grad_end = grad + end * p.classes;
  T input_copy[kLaneBlock], weight_copy[kLaneBlock], result[kLaneBlock];
  SKINFAST_FOR_LANES(i, kLaneBlock) weight_copy[i] = store<T>(A(1));
  A weight_sum = static_cast<A>(p.classes);
  if (weight != nullptr) {
    weight_sum = A(0);
    for (int64_t c = 0; c < p.classes; ++c) weight_sum += load(weight[c]);
  }
  for (int64_t n = begin; n < end; ++n) {
    const T* row = input + n * p.classes;
    T* to = grad + n * p.classes;
    if (target[n] == p.ignore_index) {
      for (int64_t c = 0; c < p.classes; ++c) to[c] = store<T>(A(0));
      continue;
    }
    const A scale = row_scale(load(grad_loss[p.reduction == kNone ? n : 0]), total_weight, p);
    const A target_weight = weight == nullptr ? A(1) : load(weight[target[n]]);
    const RowGradient<A> factors = row_gradient(scale, target_weight, weight_sum, p);
    const Normalizer<A> normalizer = normalizers[n];
    for (int64_t c = 0; c < p.classes; c += kLaneBlock) {
      const T* __restrict in = readable(row + c, input_end, input_copy);
      const T* __restrict w = weights_from(weight, c, p.classes, weight_copy);
      const integer_for<A> class_lane = in_lanes<A>(target[n] - c);
      // Past the row's end this writes into the next row, which comes later.
      T* __restrict out = grad_end - (to + c) >= kLaneBlock ? to + c : result;
      SKINFAST_FOR_LANES(i, kLaneBlock) {
        const A probability = exponential(log_probability(load(in[i]), normalizer));
        const A value = probability * factors.of_probability - load(w[i]) * factors.of_weight;
        out[i] = store<T>(i == class_lane ? value - factors.of_target : value);
      }
      if (out == result) {
        for (int64_t i = 0; i < kLaneBlock && c + i < p.classes; ++i) to[c + i] = result[i];
      }
    }
  }
}

}  // namespace

void cross_entropy(DType dtype, const void* input, const int64_t* target, const void* weight,
                   void* losses, void* normalizers, LossSum* sums, const CrossEntropyParams& params,
                   int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    forward(static_cast<const T*>(input), target, static_cast<const T*>(weight),
            static_cast<T*>(losses), static_cast<Normalizer<accumulate_t<T>>*>(normalizers), sums,
            params, begin, end);
  });
}

void cross_entropy_backward(DType dtype, const void* grad_loss, const void* input,
                            const int64_t* target, const void* weight, const void* normalizers,
                            const void* total_weight, void* grad, const CrossEntropyParams& params,
                            int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    backward(static_cast<const T*>(grad_loss), static_cast<const T*>(input), target,
             static_cast<const T*>(weight), static_cast<const Normalizer<A>*>(normalizers),
             *static_cast<const A*>(total_weight), static_cast<T*>(grad), params, begin, end);
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include <algorithm>

#include "core/parallel.h"

namespace skinfast {
namespace {

void check_targets(const char* op, const int64_t* target, const CrossEntropyParams& p) {
  for (int64_t n = 0; n < p.rows; ++n) {
    SKINFAST_CHECK((target[n] >= 0 && target[n] < p.classes) || target[n] == p.ignore_index, op,
                   ": target has ", target[n], " at row ", n, "; it needs a class from 0 to ",
                   p.classes - 1, " or ignore_index ", p.ignore_index);
  }
}

// Units of `rows` rows that are worth a thread: an exponential is about eight additions.
int64_t grain(const CrossEntropyParams& p, int64_t rows) {
  return std::max<int64_t>(1, kElementGrain / 8 / (rows * p.classes));
}

template <typename T>
void write_scalar(const Tensor& tensor, double value) {
  *static_cast<T*>(tensor.mutable_data_ptr()) = store<T>(static_cast<accumulate_t<T>>(value));
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight,
                                                     int64_t ignore_index, int64_t reduction,
                                                     double label_smoothing) {
  return cross_entropy_host(
      input, target, weight, ignore_index, reduction, label_smoothing,
      [](const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
         const Tensor& loss, const Tensor& normalizers, const Tensor& total_weight,
         const CrossEntropyParams& params) {
        const int64_t* classes = static_cast<const int64_t*>(target.const_data_ptr());
        check_targets("cross_entropy", classes, params);
        std::vector<LossSum> sums((params.rows + kBlockRows - 1) / kBlockRows);
        void* losses = params.reduction == kNone ? loss.mutable_data_ptr() : nullptr;
        parallel_for(sums.size(), grain(params, kBlockRows), [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(cross_entropy)
          (dtype_of(input), input.const_data_ptr(), classes, weight_data(weight), losses,
           normalizers.mutable_data_ptr(), sums.data(), params, begin, end);
        });
        LossSum total = {0, 0};
        for (const LossSum& sum : sums) {
          total.loss += sum.loss;
          total.weight += sum.weight;
        }
        SKINFAST_CPU_DISPATCH(dtype_of(input), T, {
          write_scalar<accumulate_t<T>>(total_weight, total.weight);
          if (params.reduction == kMean) write_scalar<T>(loss, total.loss / total.weight);
          if (params.reduction == kSum) write_scalar<T>(loss, total.loss);
        });
      });
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& input,
                                  const Tensor& target, const std::optional<Tensor>& weight,
                                  const Tensor& normalizers, const Tensor& total_weight,
                                  int64_t ignore_index, int64_t reduction, double label_smoothing) {
  return cross_entropy_backward_host(
      grad_loss, input, target, weight, normalizers, total_weight, ignore_index, reduction,
      label_smoothing,
      [](const Tensor& grad_loss, const Tensor& input, const Tensor& target,
         const std::optional<Tensor>& weight, const Tensor& normalizers, const Tensor& total_weight,
         const Tensor& grad, const CrossEntropyParams& params) {
        const int64_t* classes = static_cast<const int64_t*>(target.const_data_ptr());
        check_targets("cross_entropy_backward", classes, params);
        parallel_for(params.rows, grain(params, 1), [&](int64_t begin, int64_t end) {
          SKINFAST_KERNEL(cross_entropy_backward)
          (dtype_of(input), grad_loss.const_data_ptr(), input.const_data_ptr(), classes,
           weight_data(weight), normalizers.const_data_ptr(), total_weight.const_data_ptr(),
           grad.mutable_data_ptr(), params, begin, end);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_cpu));
}

}  // namespace skinfast
#endif
