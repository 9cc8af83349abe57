// What every host function does with its tensor arguments: checks, layouts, allocation.
// On the stable C++ ABI, so one build serves every PyTorch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/scalar.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // older headers (2.11) call it otherwise
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace skinfast {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throw a RuntimeError whose message is the remaining arguments, streamed.
#define SKINFAST_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::skinfast::fail(__VA_ARGS__); \
  } while (false)

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline std::string shape_string(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i == 0 ? "" : ", ") << tensor.size(i);
  out << ']';
  return out.str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// --- checks: `op` and `name` are what the user wrote ----------------------------------------

// Emulated kernels (tests/emulation) have CPU tensors and every dtype of a GPU.
#if defined(SKINFAST_EMULATION)
constexpr bool kHalfOnCpu = true;
#else
constexpr bool kHalfOnCpu = false;
#endif

inline void check_floating(const char* op, const char* name, ScalarType dtype, bool is_cuda) {
  const bool common = dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || (kHalfOnCpu && dtype == ScalarType::Half);
  if (is_cuda) {
    SKINFAST_CHECK(common || dtype == ScalarType::Half, op, ": ", name, " has dtype ",
                   dtype_name(dtype), "; it needs float32, float64, bfloat16 or float16");
  } else {
    SKINFAST_CHECK(common, op, ": ", name, " has dtype ", dtype_name(dtype),
                   "; on the CPU it needs float32, float64 or bfloat16");
  }
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  check_floating(op, name, tensor.scalar_type(), tensor.is_cuda());
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  SKINFAST_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has dtype ",
                 dtype_name(tensor.scalar_type()), "; it needs ", dtype_name(dtype));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor,
                             const char* other_name, const Tensor& other) {
  SKINFAST_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ",
                 dtype_name(tensor.scalar_type()), " and ", other_name, " has ",
                 dtype_name(other.scalar_type()), "; they must be equal");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* other_name, const Tensor& other) {
  SKINFAST_CHECK(tensor.device() == other.device(), op, ": ", name, " and ", other_name,
                 " are on different devices; move one with .to()");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        const std::vector<int64_t>& shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = tensor.size(i) == shape[i];
  if (equal) return;
  std::ostringstream needed;
  for (size_t i = 0; i < shape.size(); ++i) needed << (i == 0 ? "" : ", ") << shape[i];
  fail(op, ": ", name, " has shape ", shape_string(tensor), "; it needs [", needed.str(), "]");
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim,
                      const char* meaning) {
  SKINFAST_CHECK(tensor.dim() == dim, op, ": ", name, " has shape ", shape_string(tensor),
                 "; it needs ", dim, " dimensions ", meaning);
}

// --- layouts ---------------------------------------------------------------------------------

// Whether a 4-d tensor [N, C, H, W] is stored densely as N, H, W, C.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  int64_t expected = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

// The layout an op computes in: as stored where that is dense, contiguous otherwise. A tensor
// that is both (one channel, 1x1 maps) counts as contiguous. skinfast/ops/_library.py has its twin.
inline MemoryFormat layout_of(const Tensor& tensor) {
  return !tensor.is_contiguous() && is_channels_last(tensor) ? MemoryFormat::ChannelsLast
                                                             : MemoryFormat::Contiguous;
}

inline bool is_dense_in(const Tensor& tensor, MemoryFormat layout) {
  return layout == MemoryFormat::ChannelsLast ? is_channels_last(tensor) : tensor.is_contiguous();
}

// The tensor itself where it is already dense in that layout, else a copy that is.
inline Tensor dense(const Tensor& tensor, MemoryFormat layout) {
  return is_dense_in(tensor, layout) ? tensor : torch::stable::contiguous(tensor, layout);
}

inline Tensor empty_in(const Tensor& like, const std::vector<int64_t>& shape, MemoryFormat layout,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::empty(shape, dtype.value_or(like.scalar_type()), std::nullopt,
                              like.device(), std::nullopt, layout);
}

// The name of an op of ours for the dispatcher; emulated kernels call emulated ones.
#ifndef SKINFAST_NAMESPACE
#define SKINFAST_NAMESPACE skinfast
#endif
#define SKINFAST_QUOTED(text) #text
#define SKINFAST_OP_IN(space, op) SKINFAST_QUOTED(space) "::" op
#define SKINFAST_OP(op) SKINFAST_OP_IN(SKINFAST_NAMESPACE, op)

// Call an op by name that returns a tensor; `stack` holds all its arguments.
inline Tensor call_aten(const char* name, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// --- types -----------------------------------------------------------------------------------

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      return DType::kFloat;
  }
}

// The dtype that sums over a tensor are computed and stored in.
inline ScalarType accumulate_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// On an undefined optional gradient the op returns an empty tensor: the ABI has no null tensor.
inline Tensor no_tensor(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

}  // namespace skinfast
