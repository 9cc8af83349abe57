#include "conv2d_relu/conv2d_relu.h"
#include "core/vector.h"

namespace skinfast::SKINFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 2;  // 10 filters x 2 vectors of sums fit 32 registers
constexpr int kTaps = 2;
#else
constexpr int kVectors = 1;  // and 10 x 1 fit 16
constexpr int kTaps = 1;
#endif
constexpr int kFilters = static_cast<int>(kFilterBlock);
// Elements of a row that a weight-gradient task works on at once: 10 filters of them stay in L1.
constexpr int64_t kColumnBlock = 512;

SKINFAST_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SKINFAST_HOST_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// All filters of one block at one output pixel, for V vectors of images; `count` of them in the
// last vector where kPartial.
template <typename T, int V, bool kPartial>
SKINFAST_HOST_DEVICE void convolve_pixel(const SmallConv2d& conv, const T* x,
                                         const accumulate_t<T>* packed, const accumulate_t<T>* bias,
                                         bool with_relu, T* output, int filters, int64_t p,
                                         int64_t q, int count) {
  using A = accumulate_t<T>;
  using Vec = vector_t<A>;
  constexpr int L = kLanes<A>;
  Vec sum[kFilters][V];
  for (int k = 0; k < kFilters; ++k) {
    for (int v = 0; v < V; ++v) sum[k][v] = Vec{} + (bias && k < filters ? bias[k] : A(0));
  }
  const int64_t top = p - conv.pad_h, left = q - conv.pad_w;
  const int64_t r_begin = larger(0, -top), r_end = smaller(conv.R, conv.H - top);
  const int64_t s_begin = larger(0, -left), s_end = smaller(conv.S, conv.W - left);
  for (int64_t c = 0; c < conv.C; ++c) {
    for (int64_t r = r_begin; r < r_end; ++r) {
      const T* row = x + ((c * conv.H + top + r) * conv.W + left) * conv.N;
      const A* taps = packed + (c * conv.R + r) * conv.S * kFilters;
      for (int64_t s = s_begin; s < s_end; ++s) {
        Vec value[V];
        for (int v = 0; v < V; ++v) {
          const T* source = row + s * conv.N + v * L;
          value[v] = kPartial ? load_partial(source, count) : load_vector(source);
        }
        for (int k = 0; k < kFilters; ++k) {
          for (int v = 0; v < V; ++v) sum[k][v] += taps[s * kFilters + k] * value[v];
        }
      }
    }
  }
  for (int k = 0; k < filters; ++k) {
    T* target = output + ((k * conv.P + p) * conv.Q + q) * conv.N;
    for (int v = 0; v < V; ++v) {
      // `x < 0 ? 0 : x`, as relu(), so that NaN passes through.
      const Vec y = with_relu ? (sum[k][v] < Vec{} ? Vec{} : sum[k][v]) : sum[k][v];
      if (kPartial) {
        store_partial(target, y, count);
      } else {
        store_vector(target + v * L, y);
      }
    }
  }
}

template <typename T>
void convolve_row(const SmallConv2d& conv, const T* x, const accumulate_t<T>* packed,
                  const accumulate_t<T>* bias, bool with_relu, T* output, int64_t p, int64_t n,
                  int64_t n_end) {
  constexpr int L = kLanes<accumulate_t<T>>;
  for (int64_t first = 0; first < conv.K; first += kFilters) {
    const auto* block = packed + first * conv.C * conv.R * conv.S;
    const auto* block_bias = bias ? bias + first : nullptr;
    T* target = output + first * conv.P * conv.Q * conv.N;
    const int filters = static_cast<int>(smaller(kFilters, conv.K - first));
    int64_t i = n;
    for (; i + kVectors * L <= n_end; i += kVectors * L) {
      for (int64_t q = 0; q < conv.Q; ++q) {
        convolve_pixel<T, kVectors, false>(conv, x + i, block, block_bias, with_relu, target + i,
                                           filters, p, q, 0);
      }
    }
    for (; i < n_end; i += L) {
      const int count = static_cast<int>(smaller(L, n_end - i));
      for (int64_t q = 0; q < conv.Q; ++q) {
        if (count == L) {
          convolve_pixel<T, 1, false>(conv, x + i, block, block_bias, with_relu, target + i,
                                      filters, p, q, 0);
        } else {
          convolve_pixel<T, 1, true>(conv, x + i, block, block_bias, with_relu, target + i, filters,
                                     p, q, count);
        }
      }
    }
  }
}

// sums[t][k] += the products of x[t], one pointer for each tap, and of the filters' gradients over
// `count` elements of a row; both are contiguous there, since the batch is last.
template <typename T, int kCount>
SKINFAST_HOST_DEVICE void accumulate_taps(const T* const* x, const T* gradient,
                                          int64_t filter_stride, int filters, int64_t count,
                                          vector_t<accumulate_t<T>>* sums) {
  using A = accumulate_t<T>;
  using Vec = vector_t<A>;
  constexpr int L = kLanes<A>;
  Vec sum[kCount][kFilters] = {};
  // A missing filter of a partial block reads the first one; its sums are never used.
  const T* rows[kFilters];
  for (int k = 0; k < kFilters; ++k) rows[k] = gradient + (k < filters ? k : 0) * filter_stride;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vec value[kCount];
    for (int t = 0; t < kCount; ++t) value[t] = load_vector(x[t] + i);
    for (int k = 0; k < kFilters; ++k) {
      const Vec g = load_vector(rows[k] + i);
      for (int t = 0; t < kCount; ++t) sum[t][k] += g * value[t];
    }
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    for (int k = 0; k < kFilters; ++k) {
      const Vec g = load_partial(rows[k] + i, rest);
      for (int t = 0; t < kCount; ++t) sum[t][k] += g * load_partial(x[t] + i, rest);
    }
  }
  for (int t = 0; t < kCount; ++t) {
    for (int k = 0; k < kFilters; ++k) sums[t * kFilters + k] += sum[t][k];
  }
}

// The sums of one task over one output row and one kernel row: columns in blocks that stay in L1.
template <typename T>
void weight_gradient_row(const SmallConv2d& conv, const T* x_row, const T* gradient_row,
                         int64_t filter_stride, int filters, int64_t q_begin, int64_t q_end,
                         vector_t<accumulate_t<T>>* sums) {
  const auto begin_of = [&](int64_t s) { return larger(q_begin, conv.pad_w - s); };
  const auto end_of = [&](int64_t s) { return smaller(q_end, conv.W + conv.pad_w - s); };
  const auto x_of = [&](int64_t s, int64_t q) { return x_row + (q + s - conv.pad_w) * conv.N; };
  int64_t s = 0;
  while (s < conv.S) {
    const int64_t begin = begin_of(s), end = end_of(s);
    const bool pair =
        kTaps == 2 && s + 1 < conv.S && begin_of(s + 1) == begin && end_of(s + 1) == end;
    if (begin < end) {
      const T* taps[2] = {x_of(s, begin), x_of(s + (pair ? 1 : 0), begin)};
      const T* gradient = gradient_row + begin * conv.N;
      const int64_t count = (end - begin) * conv.N;
      if (pair) {
        accumulate_taps<T, kTaps>(taps, gradient, filter_stride, filters, count,
                                  sums + s * kFilters);
      } else {
        accumulate_taps<T, 1>(taps, gradient, filter_stride, filters, count, sums + s * kFilters);
      }
    }
    s += pair ? 2 : 1;
  }
}

template <typename T>
void weight_gradient_task(const SmallConv2d& conv, const T* x, const T* masked,
                          accumulate_t<T>* partial, int64_t task) {
  using A = accumulate_t<T>;
  const int64_t c = task % conv.C;
  const int64_t first = task / conv.C % ceil_div(conv.K, kFilters) * kFilters;
  const int64_t p_begin = task / conv.C / ceil_div(conv.K, kFilters) * kRowChunk;
  const int64_t p_end = smaller(conv.P, p_begin + kRowChunk);
  const int filters = static_cast<int>(smaller(kFilters, conv.K - first));
  const int64_t filter_stride = conv.P * conv.Q * conv.N;
  const int64_t block = larger(1, kColumnBlock / conv.N);

  vector_t<A> sums[kSmallKernel * kSmallKernel * kFilters] = {};
  for (int64_t p = p_begin; p < p_end; ++p) {
    const T* gradient_row = masked + first * filter_stride + p * conv.Q * conv.N;
    for (int64_t q = 0; q < conv.Q; q += block) {
      for (int64_t r = 0; r < conv.R; ++r) {
        const int64_t h = p + r - conv.pad_h;
        if (h < 0 || h >= conv.H) continue;
        const T* x_row = x + (c * conv.H + h) * conv.W * conv.N;
        weight_gradient_row(conv, x_row, gradient_row, filter_stride, filters, q,
                            smaller(conv.Q, q + block), sums + r * conv.S * kFilters);
      }
    }
  }
  const int64_t size = conv.R * conv.S * kFilters;
  for (int64_t i = 0; i < size; ++i) partial[task * size + i] = sum_lanes<A>(sums[i]);
}

}  // namespace

void pack_weight(DType dtype, const SmallConv2d& conv, const void* weight, bool turned,
                 void* packed) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const T* source = static_cast<const T*>(weight);
    A* target = static_cast<A*>(packed);
    const int64_t taps = conv.R * conv.S;
    for (int64_t k = 0; k < ceil_div(conv.K, kFilters) * kFilters; ++k) {
      for (int64_t c = 0; c < conv.C; ++c) {
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t to = ((k / kFilters * conv.C + c) * taps + t) * kFilters + k % kFilters;
          const int64_t from =
              turned ? (c * conv.K + k) * taps + (taps - 1 - t) : (k * conv.C + c) * taps + t;
          target[to] = k < conv.K ? A(load(source[from])) : A(0);
        }
      }
    }
  });
}

void small_conv2d(DType dtype, const SmallConv2d& conv, const void* x, const void* packed,
                  const void* bias, bool with_relu, void* output, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / conv.P * kImageBlock;
      convolve_row(conv, static_cast<const T*>(x), static_cast<const A*>(packed),
                   static_cast<const A*>(bias), with_relu, static_cast<T*>(output), task % conv.P,
                   n, smaller(conv.N, n + kImageBlock));
    }
  });
}

void mask_and_sum(DType dtype, const SmallConv2d& conv, const void* grad_output, const void* output,
                  void* masked, void* grad_bias, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    constexpr int L = kLanes<A>;
    constexpr int64_t kChunk = 4096;  // summed in A; the chunks in double
    const int64_t size = conv.P * conv.Q * conv.N;
    for (int64_t k = begin; k < end; ++k) {
      const T* __restrict g = static_cast<const T*>(grad_output) + k * size;
      const T* __restrict y = static_cast<const T*>(output) + k * size;
      T* __restrict m = static_cast<T*>(masked) + k * size;
      double total = 0;
      for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
        A lanes[L] = {};
        const int64_t stop = smaller(size, chunk + kChunk);
        int64_t i = chunk;
        for (; i + L <= stop; i += L) {
          for (int l = 0; l < L; ++l) {
            m[i + l] = relu_gradient(g[i + l], y[i + l]);
            lanes[l] += load(m[i + l]);
          }
        }
        for (int l = 0; l < L; ++l) total += lanes[l];
        for (; i < stop; ++i) {
          m[i] = relu_gradient(g[i], y[i]);
          total += load(m[i]);
        }
      }
      static_cast<T*>(grad_bias)[k] = store<T>(A(total));
    }
  });
}

void small_conv2d_weight_gradient(DType dtype, const SmallConv2d& conv, const void* x,
                                  const void* masked, void* partial, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t task = begin; task < end; ++task) {
      weight_gradient_task(conv, static_cast<const T*>(x), static_cast<const T*>(masked),
                           static_cast<accumulate_t<T>*>(partial), task);
    }
  });
}

void sum_weight_gradient(DType dtype, const SmallConv2d& conv, const void* partial,
                         void* grad_weight) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    using A = accumulate_t<T>;
    const int64_t taps = conv.R * conv.S;
    const int64_t blocks = ceil_div(conv.K, kFilters);
    for (int64_t i = 0; i < conv.K * conv.C * taps; ++i) {
      const int64_t t = i % taps, c = i / taps % conv.C, k = i / taps / conv.C;
      double sum = 0;
      for (int64_t chunk = 0; chunk < ceil_div(conv.P, kRowChunk); ++chunk) {
        const int64_t task = (chunk * blocks + k / kFilters) * conv.C + c;
        sum += static_cast<const A*>(partial)[(task * taps + t) * kFilters + k % kFilters];
      }
      static_cast<T*>(grad_weight)[i] = store<T>(A(sum));
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "core/parallel.h"

namespace skinfast {
namespace {

// A tensor [N, C, H, W] stored with its batch last: in memory it is [C, H, W, N].
bool is_batch_last(const Tensor& x) {
  return !x.is_contiguous() && !is_channels_last(x) && permute(x, {1, 2, 3, 0}).is_contiguous();
}
Tensor to_batch_last(const Tensor& x) {
  return torch::stable::contiguous(permute(x, {1, 2, 3, 0}));
}
// And back: a view where the caller works with the batch last too, else in his layout.
Tensor from_batch_last(const Tensor& stored, bool keep, MemoryFormat layout) {
  const Tensor view = permute(stored, {3, 0, 1, 2});
  return keep ? view : torch::stable::contiguous(view, layout);
}

Tensor packed_weight(const SmallConv2d& conv, const Tensor& weight, bool turned) {
  Tensor packed = torch::stable::new_empty(weight, {packed_size(conv)}, accumulate_dtype(weight));
  SKINFAST_KERNEL(pack_weight)
  (dtype_of(weight), conv, dense(weight, MemoryFormat::Contiguous).const_data_ptr(), turned,
   packed.mutable_data_ptr());
  return packed;
}

// stored x [C, H, W, N] -> stored output [K, P, Q, N]
Tensor convolve(const SmallConv2d& conv, const Tensor& x, const Tensor& packed, const void* bias,
                bool with_relu) {
  Tensor output = torch::stable::new_empty(x, {conv.K, conv.P, conv.Q, conv.N});
  const auto kernel = SKINFAST_KERNEL(small_conv2d);
  parallel_for(forward_tasks(conv), 1, [&](int64_t begin, int64_t end) {
    kernel(dtype_of(x), conv, x.const_data_ptr(), packed.const_data_ptr(), bias, with_relu,
           output.mutable_data_ptr(), begin, end);
  });
  return output;
}

Tensor conv2d_relu_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_relu", x, weight, bias, arguments);
  if (!is_small_conv2d(x, weight, arguments)) {
    return general_conv2d_relu(x, weight, bias, arguments);
  }
  const bool keep = is_batch_last(x);
  const MemoryFormat layout = conv2d_layout(x, weight);
  if (x.size(0) == 0) return empty_in(x, shape, layout);
  const SmallConv2d conv = small_conv2d_of(x, weight, shape, arguments);
  std::optional<Tensor> wide_bias;
  if (bias) {
    wide_bias = torch::stable::to(torch::stable::contiguous(*bias), accumulate_dtype(x));
  }
  const Tensor output =
      convolve(conv, to_batch_last(x), packed_weight(conv, weight, false),
               wide_bias ? wide_bias->const_data_ptr() : nullptr, /*with_relu=*/true);
  return from_batch_last(output, keep, layout);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_backward_cpu(
    const Tensor& grad_output, const Tensor& output, const Tensor& x, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const Conv2dArguments arguments{stride, padding, dilation, groups};
  const auto shape = check_conv2d("conv2d_relu_backward", x, weight, std::nullopt, arguments);
  check_conv2d_gradient("conv2d_relu_backward", "grad_output", grad_output, x, shape);
  check_conv2d_gradient("conv2d_relu_backward", "output", output, x, shape);
  if (!is_small_conv2d(x, weight, arguments) || x.size(0) == 0) {
    return general_conv2d_relu_backward(grad_output, output, x, weight, arguments,
                                        {want_input, want_weight, want_bias});
  }
  const SmallConv2d conv = small_conv2d_of(x, weight, shape, arguments);
  const DType dtype = dtype_of(x);
  const Tensor stored_grad = to_batch_last(grad_output), stored_output = to_batch_last(output);
  Tensor masked = torch::stable::empty_like(stored_output);
  Tensor grad_bias = torch::stable::new_empty(x, {conv.K});
  const auto mask = SKINFAST_KERNEL(mask_and_sum);
  parallel_for(conv.K, 1, [&](int64_t begin, int64_t end) {
    mask(dtype, conv, stored_grad.const_data_ptr(), stored_output.const_data_ptr(),
         masked.mutable_data_ptr(), grad_bias.mutable_data_ptr(), begin, end);
  });

  Tensor grad_x = no_tensor(x), grad_weight = no_tensor(x);
  if (want_input) {
    const SmallConv2d transposed = conv.of_input_gradient();
    grad_x = from_batch_last(
        convolve(transposed, masked, packed_weight(transposed, weight, true), nullptr, false),
        is_batch_last(x), conv2d_layout(x, weight));
  }
  if (want_weight) {
    const Tensor stored_x = to_batch_last(x);
    Tensor partial = torch::stable::new_empty(
        x, {weight_tasks(conv) * conv.R * conv.S * kFilterBlock}, accumulate_dtype(x));
    const auto kernel = SKINFAST_KERNEL(small_conv2d_weight_gradient);
    parallel_for(weight_tasks(conv), 1, [&](int64_t begin, int64_t end) {
      kernel(dtype, conv, stored_x.const_data_ptr(), masked.const_data_ptr(),
             partial.mutable_data_ptr(), begin, end);
    });
    Tensor summed = torch::stable::new_empty(weight, shape_of(weight));
    SKINFAST_KERNEL(sum_weight_gradient)
    (dtype, conv, partial.const_data_ptr(), summed.mutable_data_ptr());
    grad_weight = dense(summed, layout_of(weight));
  }
  return {grad_x, grad_weight, want_bias ? grad_bias : no_tensor(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu_cpu));
  m.impl("conv2d_relu_backward", TORCH_BOX(&conv2d_relu_backward_cpu));
}

}  // namespace skinfast
#endif
