// One step of Adam (Kingma and Ba, 2015; paper, section 3) for every parameter of a group.
#pragma once

#include <math.h>

#include <type_traits>

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// The settings of one call, equal for all its parameters.
struct AdamOptions {
  double beta1;
  double beta2;
  double weight_decay;
  double eps;
  bool maximize;
  bool decoupled_weight_decay;
};

// One parameter: gradient and state lie in memory in its own order, `count` elements each.
struct AdamTensor {
  void* param;
  const void* grad;
  void* copy;  // the parameter in the gradient's lower precision; null where they have one dtype
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  float* step;
  int64_t count;
};

// The factors of the update of one parameter, computed in double, used in its arithmetic type A.
template <typename A>
struct AdamScalars {
  A grad_factor;   // 1 / grad_scale; negative to maximize
  A weight_decay;  // 0 where decoupled
  A param_factor;  // 1 - lr * weight_decay where decoupled, else 1
  A one_minus_beta1;
  A beta2;
  A one_minus_beta2;
  A negative_step_size;     // -lr / (1 - beta1^step)
  A bias_correction2_sqrt;  // sqrt(1 - beta2^step)
  A eps;
};

// `step` counts the present one: it has been advanced already.
SKINFAST_HOST_DEVICE AdamScalars<double> adam_scalars(const AdamOptions& options, double lr,
                                                      double step, double grad_scale) {
  const bool decoupled = options.decoupled_weight_decay;
  return {(options.maximize ? -1.0 : 1.0) / grad_scale,
          decoupled ? 0.0 : options.weight_decay,
          decoupled ? 1.0 - lr * options.weight_decay : 1.0,
          1.0 - options.beta1,
          options.beta2,
          1.0 - options.beta2,
          -lr / (1.0 - pow(options.beta1, step)),
          sqrt(1.0 - pow(options.beta2, step)),
          options.eps};
}

template <typename A>
SKINFAST_HOST_DEVICE AdamScalars<A> rounded(const AdamScalars<double>& s) {
  return {
      A(s.grad_factor), A(s.weight_decay),    A(s.param_factor),       A(s.one_minus_beta1),
      A(s.beta2),       A(s.one_minus_beta2), A(s.negative_step_size), A(s.bias_correction2_sqrt),
      A(s.eps)};
}

SKINFAST_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
SKINFAST_HOST_DEVICE double square_root(double x) { return sqrt(x); }

// Element i, operation for operation as torch.optim.Adam computes it on one tensor (its fused
// twin, which is algebraically the same, rounds elsewhere). State is rounded to T once, at the end.
template <bool kAmsgrad, typename T, typename G, typename A>
SKINFAST_HOST_DEVICE void adam_element(const AdamScalars<A>& s, T* param, const G* grad, G* copy,
                                       T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq, int64_t i) {
  const A p = product(load(param[i]), s.param_factor);
  A g = load(grad[i]) * s.grad_factor;
  // Not unconditionally: 0 * p is NaN where p is infinite, and would spoil the state.
  if (s.weight_decay != A(0)) g += s.weight_decay * p;

  // torch.lerp: the form that is exact at both ends, beta1 = 0 and beta1 -> 1.
  A m = load(exp_avg[i]);
  m = s.one_minus_beta1 < A(0.5) ? m + s.one_minus_beta1 * (g - m)
                                 : g - (g - m) * (A(1) - s.one_minus_beta1);
  const A v = load(exp_avg_sq[i]) * s.beta2 + s.one_minus_beta2 * g * g;
  A largest = v;
  if constexpr (kAmsgrad) {
    const A before = load(max_exp_avg_sq[i]);
    largest = v > before || v != v ? v : before;  // NaN passes on, as in torch.maximum
    max_exp_avg_sq[i] = store<T>(largest);
  }
  const A denominator = square_root(largest) / s.bias_correction2_sqrt + s.eps;

  const T updated = store<T>(p + s.negative_step_size * m / denominator);
  param[i] = updated;
  if constexpr (!std::is_same_v<T, G>) copy[i] = store<G>(load(updated));
  exp_avg[i] = store<T>(m);
  exp_avg_sq[i] = store<T>(v);
}

// CPU kernel: the elements [begin, end) of one parameter.
SKINFAST_DECLARE_KERNEL(void adam(DType dtype, DType grad_dtype, const AdamTensor& tensor,
                                  const AdamScalars<double>& scalars, int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include <algorithm>

#include "core/tensor.h"

namespace skinfast {

// A checked call. The pointers in `tensors` stay valid while it lives.
struct AdamCall {
  std::vector<AdamTensor> tensors;
  std::vector<DType> dtypes, grad_dtypes;  // of tensors, one by one
  Tensor first;                            // params[0], for its device and stream
  AdamOptions options;
  double lr;
  bool amsgrad;
  // One element on the parameters' device, or null; lr_tensor replaces lr.
  const double* lr_tensor;
  const float* grad_scale;
  const float* found_inf;
  std::vector<Tensor> copied_grads;
};

// Equal but for dimensions of size 1, whose strides mean nothing.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), first = a.strides(), second = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && first[i] != second[i]) return false;
  }
  return true;
}

// Whether the elements fill one range of memory, each once, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // (stride, size)
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) dimensions.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline std::string item_name(const char* list, size_t i) {
  return std::string(list).append("[").append(std::to_string(i)).append("]");
}

// Shape, dtype and device of list[i] are those of params[i].
inline void check_like_param(const char* list, size_t i, const Tensor& tensor,
                             const Tensor& param) {
  const auto sizes = tensor.sizes(), needed = param.sizes();
  if (tensor.scalar_type() == param.scalar_type() && tensor.device() == param.device() &&
      sizes.size() == needed.size() && std::equal(sizes.begin(), sizes.end(), needed.begin())) {
    return;  // the names below are made for a message only
  }
  const std::string name = item_name(list, i), param_name = item_name("params", i);
  check_same_device("adam_", name.c_str(), tensor, param_name.c_str(), param);
  check_same_dtype("adam_", name.c_str(), tensor, param_name.c_str(), param);
  check_shape("adam_", name.c_str(), tensor, shape_of(param));
}

inline void* state_pointer(const char* list, size_t i, const Tensor& state, const Tensor& param) {
  check_like_param(list, i, state, param);
  SKINFAST_CHECK(same_strides(state, param), "adam_: ", list, "[", i,
                 "] has other strides than params[", i,
                 "]; it needs the same, as zeros_like gives");
  return state.mutable_data_ptr();
}

// Where a float32 parameter's gradient came in lower precision: the parameter in that.
inline void* lower_precision_copy(size_t i, const Tensor& copy, const Tensor& grad,
                                  const Tensor& param) {
  const ScalarType lower = grad.scalar_type();
  SKINFAST_CHECK(param.scalar_type() == ScalarType::Float &&
                     (lower == ScalarType::BFloat16 ||
                      (lower == ScalarType::Half && (kHalfOnCpu || param.is_cuda()))),
                 "adam_: copies[", i, "] belongs to a ", dtype_name(param.scalar_type()),
                 " parameter with a ", dtype_name(lower),
                 " gradient; it needs float32 with bfloat16 or (CUDA) float16");
  const std::string name = item_name("copies", i), grad_name = item_name("grads", i);
  for (const auto& [tensor_name, tensor] :
       {std::pair{&name, &copy}, std::pair{&grad_name, &grad}}) {
    check_dtype("adam_", tensor_name->c_str(), *tensor, lower);
    check_shape("adam_", tensor_name->c_str(), *tensor, shape_of(param));
    check_same_device("adam_", tensor_name->c_str(), *tensor, "params[0]", param);
  }
  SKINFAST_CHECK(same_strides(copy, param), "adam_: copies[", i, "] has other strides than params[",
                 i, "]; it needs the same");
  return copy.mutable_data_ptr();
}

// The value of one float32 on the parameters' device.
template <typename T = float>
T* scalar_pointer(const std::string& name, const Tensor& scalar, const Tensor& param) {
  check_same_device("adam_", name.c_str(), scalar, "params[0]", param);
  check_dtype("adam_", name.c_str(), scalar,
              std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  SKINFAST_CHECK(scalar.numel() == 1, "adam_: ", name, " has ", scalar.numel(),
                 " elements; it needs 1");
  return static_cast<T*>(scalar.mutable_data_ptr());
}
template <typename T = float>
const T* scalar_pointer(const char* name, const std::optional<Tensor>& scalar,
                        const Tensor& param) {
  return scalar.has_value() ? scalar_pointer<T>(std::string(name), *scalar, param) : nullptr;
}

inline void check_length(const char* list, const std::vector<Tensor>& tensors, size_t needed) {
  SKINFAST_CHECK(tensors.size() == needed, "adam_: ", list, " has ", tensors.size(),
                 " tensors; it needs ", needed);
}

inline void check_options(double lr, const AdamOptions& options) {
  SKINFAST_CHECK(lr >= 0, "adam_: lr has the value ", lr, "; it needs one of at least 0");
  SKINFAST_CHECK(options.beta1 >= 0 && options.beta1 < 1, "adam_: beta1 has the value ",
                 options.beta1, "; it needs one in [0, 1)");
  SKINFAST_CHECK(options.beta2 >= 0 && options.beta2 < 1, "adam_: beta2 has the value ",
                 options.beta2, "; it needs one in [0, 1)");
  SKINFAST_CHECK(options.weight_decay >= 0, "adam_: weight_decay has the value ",
                 options.weight_decay, "; it needs one of at least 0");
  SKINFAST_CHECK(options.eps >= 0, "adam_: eps has the value ", options.eps,
                 "; it needs one of at least 0");
}

// The op; `kRun` is a backend's part of it. All is checked before anything is written.
template <void (*kRun)(const AdamCall&)>
void adam_host(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
               const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
               const std::vector<Tensor>& max_exp_avg_sqs, const std::vector<Tensor>& state_steps,
               const std::vector<Tensor>& copies, double lr, const std::optional<Tensor>& lr_tensor,
               double beta1, double beta2, double weight_decay, double eps, bool amsgrad,
               bool maximize, bool decoupled_weight_decay, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf) {
  const size_t count = params.size();
  const AdamOptions options{beta1, beta2, weight_decay, eps, maximize, decoupled_weight_decay};
  check_options(lr, options);
  check_length("grads", grads, count);
  check_length("exp_avgs", exp_avgs, count);
  check_length("exp_avg_sqs", exp_avg_sqs, count);
  check_length("max_exp_avg_sqs", max_exp_avg_sqs, amsgrad ? count : 0);
  check_length("state_steps", state_steps, count);
  if (!copies.empty()) check_length("copies", copies, count);
  if (count == 0) return;

  AdamCall call{{},
                {},
                {},
                params[0],
                options,
                lr,
                amsgrad,
                scalar_pointer<double>("lr_tensor", lr_tensor, params[0]),
                scalar_pointer("grad_scale", grad_scale, params[0]),
                scalar_pointer("found_inf", found_inf, params[0]),
                {}};
  call.tensors.reserve(count);
  call.dtypes.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    const std::string name = item_name("params", i);
    check_floating("adam_", name.c_str(), param);
    check_same_device("adam_", name.c_str(), param, "params[0]", params[0]);
    SKINFAST_CHECK(is_dense(param), "adam_: ", name,
                   " has gaps or overlaps in memory; it needs a dense layout, as clone() gives");
    const bool copied =
        !copies.empty() && (copies[i].numel() > 0 || grads[i].scalar_type() != param.scalar_type());
    void* copy = copied ? lower_precision_copy(i, copies[i], grads[i], param) : nullptr;
    if (!copied) check_like_param("grads", i, grads[i], param);
    Tensor grad = grads[i];
    if (!same_strides(grad, param)) {
      grad = torch::stable::empty_like(copied ? copies[i] : param);
      torch::stable::copy_(grad, grads[i]);
      call.copied_grads.push_back(grad);
    }
    call.tensors.push_back(
        {param.mutable_data_ptr(), grad.const_data_ptr(), copy,
         state_pointer("exp_avgs", i, exp_avgs[i], param),
         state_pointer("exp_avg_sqs", i, exp_avg_sqs[i], param),
         amsgrad ? state_pointer("max_exp_avg_sqs", i, max_exp_avg_sqs[i], param) : nullptr,
         scalar_pointer(item_name("state_steps", i), state_steps[i], params[0]), param.numel()});
    call.dtypes.push_back(dtype_of(param));
    call.grad_dtypes.push_back(dtype_of(grad));
  }
  kRun(call);
}

}  // namespace skinfast
#endif
