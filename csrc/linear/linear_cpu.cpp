#include "core/relu.h"
#include "core/transpose.h"
#include "linear/linear.h"

namespace skinfast::SKINFAST_ISA {
namespace {

constexpr int kRowBlock = 4;
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 4 x 4 sums, and what they are made of, fit 32 registers
#else
constexpr int kVectors = 2;  // and 4 x 2 fit 16
#endif

// Rows of packed [depth, packed_columns] from the columns of b [columns, depth], a square of lanes
// at a time; the padding is written as zeros.
template <typename T>
void pack_transposed(const SmallProduct& p, const T* b, accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  for (int64_t j = 0; j < p.packed_columns(); j += L) {
    for (int64_t d = 0; d < p.depth; d += L) {
      const int filled = static_cast<int>(p.depth - d < L ? p.depth - d : L);
      vector_t<A> block[L];
      for (int i = 0; i < L; ++i) {
        const T* source = b + (j + i) * p.depth + d;
        block[i] = j + i >= p.columns ? vector_t<A>{}
                   : filled == L      ? load_vector(source)
                                      : load_partial(source, filled);
      }
      transpose<A>(block);
      for (int i = 0; i < filled; ++i) {
        store_vector(packed + (d + i) * p.packed_columns() + j, block[i]);
      }
    }
  }
}

template <typename T>
void pack_rows(const SmallProduct& p, const T* b, accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  for (int64_t d = 0; d < p.depth; ++d, b += p.columns) {
    for (int64_t j = 0; j < p.packed_columns(); j += L, packed += L) {
      const int64_t left = p.columns - j;
      store_vector(packed, left >= L  ? load_vector(b + j)
                           : left > 0 ? load_partial(b + j, static_cast<int>(left))
                                      : vector_t<A>{});
    }
  }
}

// kRows x kColumns vectors of c, from column j on.
template <int kRows, int kColumns, typename T>
void product_block(const SmallProduct& p, const T* a, const accumulate_t<T>* packed, const T* bias,
                   T* c, int64_t j) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  vector_t<A> sum[kRows][kColumns] = {};
  const A* row = packed + j;
  for (int64_t d = 0; d < p.depth; ++d, row += p.packed_columns()) {
    vector_t<A> value[kColumns];
    for (int v = 0; v < kColumns; ++v) value[v] = load_vector(row + v * L);
    for (int r = 0; r < kRows; ++r) {
      const A factor = load(a[r * p.a_row + d * p.a_depth]);
      for (int v = 0; v < kColumns; ++v) sum[r][v] += factor * value[v];
    }
  }
  for (int v = 0; v < kColumns; ++v, j += L) {
    const int count = static_cast<int>(p.columns - j < L ? p.columns - j : L);
    if (count <= 0) return;  // vectors that are padding alone
    const vector_t<A> shift = bias == nullptr ? vector_t<A>{}
                              : count == L    ? load_vector(bias + j)
                                              : load_partial(bias + j, count);
    for (int r = 0; r < kRows; ++r) {
      vector_t<A> value = sum[r][v] + shift;
      // `x < 0 ? 0 : x`, as relu(), so that NaN passes through.
      if (p.relu) value = value < A(0) ? vector_t<A>{} : value;
      T* target = c + r * p.columns + j;
      if (count == L) {
        store_vector(target, value);
      } else {
        store_partial(target, value, count);
      }
    }
  }
}

template <int kRows, typename T>
void product_rows(const SmallProduct& p, const T* a, const accumulate_t<T>* packed, const T* bias,
                  T* c) {
  constexpr int L = kLanes<accumulate_t<T>>;
  const int64_t end = (p.columns + L - 1) / L * L;
  int64_t j = 0;
  for (; j + kVectors * L <= end; j += kVectors * L) {
    product_block<kRows, kVectors>(p, a, packed, bias, c, j);
  }
  if (kVectors > 2 && j + 2 * L <= end) {
    product_block<kRows, 2>(p, a, packed, bias, c, j);
    j += 2 * L;
  }
  if (j < end) product_block<kRows, 1>(p, a, packed, bias, c, j);
}

}  // namespace

void pack_product(DType dtype, const SmallProduct& product, const void* b, bool transposed,
                  void* packed) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto pack = transposed ? &pack_transposed<T> : &pack_rows<T>;
    pack(product, static_cast<const T*>(b), static_cast<accumulate_t<T>*>(packed));
  });
}

void small_product(DType dtype, const SmallProduct& product, const void* a, const void* packed,
                   const void* bias, void* c, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const auto* b = static_cast<const accumulate_t<T>*>(packed);
    const auto* shift = static_cast<const T*>(bias);
    const T* row = static_cast<const T*>(a) + begin * product.a_row;
    T* result = static_cast<T*>(c) + begin * product.columns;
    for (; begin + kRowBlock <= end; begin += kRowBlock) {
      product_rows<kRowBlock>(product, row, b, shift, result);
      row += kRowBlock * product.a_row;
      result += kRowBlock * product.columns;
    }
    for (; begin < end; ++begin, row += product.a_row, result += product.columns) {
      product_rows<1>(product, row, b, shift, result);
    }
  });
}

void sum_columns(DType dtype, int64_t M, int64_t N, const void* grad_output, const void* output,
                 void* masked, void* grad_bias, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumnBlock;
      const int64_t columns = N - first < kColumnBlock ? N - first : kColumnBlock;
      double sum[kColumnBlock] = {};
      for (int64_t m = 0; m < M; ++m) {
        const T* __restrict g = static_cast<const T*>(grad_output) + m * N + first;
        if (output == nullptr) {
          for (int64_t i = 0; i < columns; ++i) sum[i] += load(g[i]);
          continue;
        }
        const T* __restrict y = static_cast<const T*>(output) + m * N + first;
        T* __restrict result = static_cast<T*>(masked) + m * N + first;
        for (int64_t i = 0; i < columns; ++i) {
          result[i] = relu_gradient(g[i], y[i]);
          sum[i] += load(result[i]);
        }
      }
      T* bias = static_cast<T*>(grad_bias) + first;
      for (int64_t i = 0; i < columns; ++i) bias[i] = store<T>(accumulate_t<T>(sum[i]));
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include "linear/linear_small_cpu.h"

namespace skinfast {
namespace {

Tensor linear_forward_cpu(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  return linear_cpu("linear", x, weight, bias, /*relu=*/false);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                       const Tensor& weight, bool want_input,
                                                       bool want_weight, bool want_bias) {
  constexpr const char* op = "linear_backward";
  check_linear_gradient(op, "grad_output", grad_output, check_linear(op, x, weight, std::nullopt),
                        x);
  const Tensor rows = torch::stable::contiguous(rows_of(grad_output));
  const auto [grad_x, grad_weight] = linear_gradients_cpu(rows, x, weight, want_input, want_weight);
  return {grad_x, grad_weight, want_bias ? sum_columns_cpu(rows, nullptr, nullptr) : no_tensor(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_forward_cpu));
  m.impl("linear_backward", TORCH_BOX(&linear_backward_cpu));
}

}  // namespace skinfast
#endif
