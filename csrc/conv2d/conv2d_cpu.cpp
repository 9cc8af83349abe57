#include "conv2d/conv2d.h"

namespace skinfast::SKINFAST_ISA {

void gather_patches(DType dtype, const PatchConv2d& conv, const void* x, void* patches,
                    int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const size_t bytes = static_cast<size_t>(conv.C) * sizeof(T);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / (conv.P * conv.Q), p = row / conv.Q % conv.P, q = row % conv.Q;
      T* target = static_cast<T*>(patches) + row * conv.patch();
      for (int64_t r = 0; r < conv.R; ++r) {
        const int64_t h = p * conv.stride_h + r - conv.pad_h;
        for (int64_t s = 0; s < conv.S; ++s, target += conv.C) {
          const int64_t w = q * conv.stride_w + s - conv.pad_w;
          if (h >= 0 && h < conv.H && w >= 0 && w < conv.W) {
            const T* source = static_cast<const T*>(x) + ((n * conv.H + h) * conv.W + w) * conv.C;
            memcpy(target, source, bytes);
          } else {
            memset(target, 0, bytes);
          }
        }
      }
    }
  });
}

void scatter_patches(DType dtype, const PatchConv2d& conv, const void* grad_patches, void* grad_x,
                     int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    constexpr int64_t kChannels = 256;  // whose sums stay in L1
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t n = pixel / (conv.H * conv.W);
      const int64_t h = pixel / conv.W % conv.H, w = pixel % conv.W;
      for (int64_t first = 0; first < conv.C; first += kChannels) {
        const int64_t count = conv.C - first < kChannels ? conv.C - first : kChannels;
        A sum[kChannels] = {};
        for (int64_t r = 0; r < conv.R; ++r) {
          const int64_t down = h + conv.pad_h - r, p = down / conv.stride_h;
          if (down < 0 || down % conv.stride_h != 0 || p >= conv.P) continue;
          for (int64_t s = 0; s < conv.S; ++s) {
            const int64_t right = w + conv.pad_w - s, q = right / conv.stride_w;
            if (right < 0 || right % conv.stride_w != 0 || q >= conv.Q) continue;
            const T* __restrict source = static_cast<const T*>(grad_patches) +
                                         ((n * conv.P + p) * conv.Q + q) * conv.patch() +
                                         (r * conv.S + s) * conv.C + first;
            for (int64_t c = 0; c < count; ++c) sum[c] += load(source[c]);
          }
        }
        T* __restrict target = static_cast<T*>(grad_x) + pixel * conv.C + first;
        for (int64_t c = 0; c < count; ++c) target[c] = store<T>(sum[c]);
      }
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include <algorithm>
#include <limits>

#include "conv2d/conv2d_panels_host.h"
#include "conv2d/conv2d_winograd_host.h"
#include "core/parallel.h"

namespace skinfast {
namespace {

using torch::stable::detail::from;

// The taps that ever touch the map: all others multiply padding. A 3x3 kernel on a 1x1 map is its
// centre.
struct Taps {
  int64_t begin, end;
};

Taps taps_of(int64_t extent, int64_t kernel, int64_t stride, int64_t padding, int64_t outputs) {
  return {std::max<int64_t>(0, padding - (outputs - 1) * stride),
          std::min(kernel, extent + padding)};
}

// [N, C, H, W] stored channels_last as [N * H * W, C]; a view wherever the rows allow one.
Tensor rows_of(const Tensor& x, int64_t columns) {
  return torch::stable::reshape(permute(x, {0, 2, 3, 1}), {-1, columns});
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// result = a b, written where result lies.
void multiply_into(const Tensor& result, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(result)};
  call_aten("aten::mm", "out", stack.data());
}

// A convolution as matrix products, or nothing where ATen's is as good.
struct Products {
  PatchConv2d conv;
  Taps r, s;

  bool is_cropped(const Tensor& weight) const {
    return conv.R != weight.size(2) || conv.S != weight.size(3);
  }
  PanelProducts in_panels(const Tensor& weight) const {
    return {conv, r.begin, s.begin, weight.size(2), weight.size(3)};
  }
  // The taps in use, [K, R * S * C].
  Tensor weight_rows(const Tensor& weight) const {
    return torch::stable::reshape(permute(used_taps(weight), {0, 2, 3, 1}), {conv.K, -1});
  }
  Tensor used_taps(const Tensor& weight) const {
    Tensor view = weight;
    view = torch::stable::narrow(view, 2, r.begin, conv.R);
    return torch::stable::narrow(view, 3, s.begin, conv.S);
  }
  Tensor patches(const Tensor& x) const {
    if (conv.is_pointwise()) return rows_of(x, conv.C);
    Tensor result = torch::stable::new_empty(x, {conv.rows(), conv.patch()});
    const auto kernel = SKINFAST_KERNEL(gather_patches);
    const int64_t grain = kElementGrain / conv.patch() + 1;
    parallel_for(conv.rows(), grain, [&](int64_t begin, int64_t end) {
      kernel(dtype_of(x), conv, x.const_data_ptr(), result.mutable_data_ptr(), begin, end);
    });
    return result;
  }
  void input_gradient(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_x) const {
    const Tensor grad_rows = rows_of(grad_output, conv.K), rows = weight_rows(weight);
    if (conv.is_pointwise()) return multiply_into(rows_of(grad_x, conv.C), grad_rows, rows);
    const Tensor grad_patches = torch::stable::matmul(grad_rows, rows);
    const auto kernel = SKINFAST_KERNEL(scatter_patches);
    parallel_for(conv.N * conv.H * conv.W, kElementGrain / conv.patch() + 1,
                 [&](int64_t begin, int64_t end) {
                   kernel(dtype_of(grad_x), conv, grad_patches.const_data_ptr(),
                          grad_x.mutable_data_ptr(), begin, end);
                 });
  }
  // Into the taps in use.
  void weight_gradient(const Tensor& grad_output, const Tensor& x,
                       const Tensor& grad_weight) const {
    const Tensor grad_rows = transposed(rows_of(grad_output, conv.K));
    if (!is_cropped(grad_weight)) {
      return multiply_into(weight_rows(grad_weight), grad_rows, patches(x));
    }
    Tensor used = permute(used_taps(grad_weight), {0, 2, 3, 1});
    torch::stable::copy_(used, torch::stable::reshape(torch::stable::matmul(grad_rows, patches(x)),
                                                      {conv.K, conv.R, conv.S, conv.C}));
  }
};

// What is computed of a convolution.
enum class Result { kOutput, kInputGradient, kWeightGradient };

// Whether the sizes make products the faster way; measured, see docs/performance.md. On Intel MKL's
// products are fast and oneDNN's bfloat16 gradients slow on any map that is not large; off Intel
// MKL's are slower, and of those gradients only that of the weight is slow.
bool prefer_products(const PatchConv2d& conv, DType dtype, Result result) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  const bool narrow = dtype == DType::kBFloat16, intel = is_intel();
  if (conv.C < 16) return false;
  if (conv.is_single_tap()) {
    return conv.rows() <= (narrow ? (intel ? kAny : 2048) : (intel ? 4096 : 256));
  }
  return conv.P * conv.Q <= (narrow && (intel || result == Result::kWeightGradient) ? 16 : 4);
}

// Likewise panels, where they can be had. On larger maps oneDNN's direct convolution has less to
// copy; but its gradients of the weight and of what a stride passed over are slow. What panels gain
// in bfloat16 are the taps in the padding, for MKL's products of two matrices are as fast, except
// of the centre taps that maps of one pixel leave of the weights.
bool prefer_panels(const PatchConv2d& conv, DType dtype, Result result) {
  // Behind a 1x1 kernel only the pixels that it touched have a gradient.
  const bool all_pixels = result == Result::kInputGradient && !conv.is_single_tap();
  const int64_t pixels = conv.H * conv.W, rows = all_pixels ? conv.N * pixels : conv.rows();
  if (cpu_isa() == Isa::kAmxBf16) return rows <= 4096;
  const bool strided = conv.stride_h * conv.stride_w > 1;
  if (result == Result::kInputGradient && strided && cpu_isa() > Isa::kAvx2) return true;
  if (result == Result::kWeightGradient) {
    if (dtype == DType::kBFloat16) return true;
    return rows <= 4096 || (!conv.is_single_tap() && cpu_isa() == Isa::kAvx2);
  }
  if (dtype == DType::kBFloat16) return pixels == 1 || (pixels <= 16 && !conv.is_single_tap());
  return rows <= 1024;
}

// How to compute it.
enum class Way { kAten, kProducts, kPanels, kWinograd };

Way way_of(const PatchConv2d& conv, DType dtype, Result result) {
  if (PanelProducts::can(conv, dtype)) {
    if (dtype == DType::kFloat && WinogradProducts::can(conv)) return Way::kWinograd;
    if (prefer_panels(conv, dtype, result)) return Way::kPanels;
  }
  return prefer_products(conv, dtype, result) ? Way::kProducts : Way::kAten;
}

std::optional<Products> as_products(const Tensor& x, const Tensor& weight,
                                    const std::vector<int64_t>& shape,
                                    const Conv2dArguments& arguments) {
  if (arguments.groups != 1 || arguments.dilation[0] != 1 || arguments.dilation[1] != 1 ||
      !is_channels_last(x) || !is_channels_last(weight) || x.numel() == 0) {
    return std::nullopt;
  }
  // A kernel of one tap and maps of one pixel are stored as in either layout; the output is not.
  if (conv2d_layout(x, weight) != MemoryFormat::ChannelsLast && shape[2] * shape[3] != 1) {
    return std::nullopt;
  }
  const Taps r = taps_of(x.size(2), weight.size(2), arguments.stride[0], arguments.padding[0],
                         shape[2]),
             s = taps_of(x.size(3), weight.size(3), arguments.stride[1], arguments.padding[1],
                         shape[3]);
  const PatchConv2d conv{x.size(0),
                         x.size(1),
                         x.size(2),
                         x.size(3),
                         weight.size(0),
                         r.end - r.begin,
                         s.end - s.begin,
                         shape[2],
                         shape[3],
                         shape[2] == 1 ? 1 : arguments.stride[0],
                         shape[3] == 1 ? 1 : arguments.stride[1],
                         arguments.padding[0] - r.begin,
                         arguments.padding[1] - s.begin};
  if (conv.R <= 0 || conv.S <= 0) return std::nullopt;
  return Products{conv, r, s};
}

Tensor conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d", x, weight, bias, arguments);
  if (wants_float32(x)) {
    return torch::stable::to(conv2d_cpu(to_float32(x), to_float32(weight), to_float32(bias), stride,
                                        padding, dilation, groups),
                             x.scalar_type());
  }
  const MemoryFormat layout = conv2d_layout(x, weight);
  const Tensor dense_x = dense(x, layout);
  const auto products = as_products(dense_x, weight, shape, arguments);
  const Way way =
      products && !bias ? way_of(products->conv, dtype_of(x), Result::kOutput) : Way::kAten;
  if (way == Way::kAten) return aten_conv2d(x, weight, bias, arguments);

  Tensor output = empty_in(x, shape, layout);
  if (way == Way::kWinograd) {
    WinogradProducts(products->conv).forward(dense_x, weight, output);
  } else if (way == Way::kPanels) {
    products->in_panels(weight).forward(dense_x, weight, output);
  } else {
    multiply_into(rows_of(output, shape[1]), products->patches(dense_x),
                  transposed(products->weight_rows(weight)));
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                       const Tensor& weight,
                                                       const std::vector<int64_t>& stride,
                                                       const std::vector<int64_t>& padding,
                                                       const std::vector<int64_t>& dilation,
                                                       int64_t groups, bool want_input,
                                                       bool want_weight, bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_backward", x, weight, std::nullopt, arguments);
  check_conv2d_gradient("conv2d_backward", "grad_output", grad_output, x, shape);
  if (wants_float32(x)) {
    return to_dtype(
        conv2d_backward_cpu(to_float32(grad_output), to_float32(x), to_float32(weight), stride,
                            padding, dilation, groups, want_input, want_weight, want_bias),
        x.scalar_type());
  }
  const MemoryFormat layout = conv2d_layout(x, weight);
  const Tensor dense_x = dense(x, layout);
  const auto products = as_products(dense_x, weight, shape, arguments);
  Way input_way = Way::kAten, weight_way = Way::kAten;
  if (products && !want_bias) {
    input_way = way_of(products->conv, dtype_of(x), Result::kInputGradient);
    weight_way = way_of(products->conv, dtype_of(x), Result::kWeightGradient);
  }
  auto [grad_x, grad_weight, grad_bias] = aten_conv2d_backward(
      grad_output, x, weight, arguments,
      {want_input && input_way == Way::kAten, want_weight && weight_way == Way::kAten, want_bias});
  const Tensor dense_grad = dense(grad_output, layout);
  if (want_input && input_way != Way::kAten) {
    grad_x = empty_in(x, shape_of(x), layout);
    if (input_way == Way::kWinograd) {
      WinogradProducts(products->conv).input_gradient(dense_grad, weight, grad_x);
    } else if (input_way == Way::kPanels) {
      products->in_panels(weight).input_gradient(dense_grad, weight, grad_x);
    } else {
      products->input_gradient(dense_grad, weight, grad_x);
    }
  }
  if (want_weight && weight_way != Way::kAten) {
    grad_weight = empty_in(weight, shape_of(weight), layout_of(weight));
    if (products->is_cropped(weight)) torch::stable::zero_(grad_weight);
    if (weight_way == Way::kWinograd) {
      WinogradProducts(products->conv).weight_gradient(dense_grad, dense_x, grad_weight);
    } else if (weight_way == Way::kPanels) {
      products->in_panels(weight).weight_gradient(dense_grad, dense_x, grad_weight);
    } else {
      products->weight_gradient(dense_grad, dense_x, grad_weight);
    }
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_cpu));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward_cpu));
}

}  // namespace skinfast
#endif
