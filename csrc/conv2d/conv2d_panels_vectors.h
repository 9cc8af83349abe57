// Products of panels of 32 rows and 32 columns by multiply-adds in vectors: of float32, and of
// bfloat16 where an instruction adds the products of two pairs. Included inside CPU kernel files
// only.
//
// The left operand is stored in blocks of 32 rows of 32 numbers that are summed over, or turned
// over where it comes so, the right one in blocks of 32 such numbers by 32 columns: what a step of
// the sum needs lies in a few cache lines. Of bfloat16 the numbers lie in pairs, 2k and 2k + 1 of
// those that are summed over.
#pragma once

#include "conv2d/conv2d_panels.h"
#include "core/transpose.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // a copy for each file: no symbol that the linker could share

// Packing of float32, a number a step of the sum.
struct FloatBlocks {
  using Number = float;
  using Element = float;
  typedef vector_t<float> Elements;
  static constexpr int64_t kSteps = kPanel;  // of the sum in a block

  // 32 rows of 32 numbers, summed over across the rows: stored as they are.
  static void pack_across(const float* const* rows, float* block) {
    for (int64_t i = 0; i < kPanel; ++i)
      memcpy(block + i * kPanel, rows[i], kPanel * sizeof(float));
  }
  static void multiply_add(vector_t<float>& sum, float left, const Elements& right) {
    sum += left * right;
  }
};

#if defined(__AVX512BF16__)
// Packing of bfloat16, a pair a step.
struct PairBlocks {
  using Number = BFloat16;
  using Element = uint32_t;
  typedef uint32_t Elements __attribute__((vector_size(64)));
  static constexpr int64_t kSteps = kPanel / 2;

  static void pack_across(const BFloat16* const* rows, uint32_t* block) {
    alignas(64) uint16_t low[kPanel], high[kPanel];  // how to pair the lanes of two rows
    for (int i = 0; i < kPanel; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * kPanel);
      high[i] = static_cast<uint16_t>(low[i] + kPanel / 2);
    }
    const __m512i first_pairs = _mm512_load_si512(low), last_pairs = _mm512_load_si512(high);
    for (int64_t k = 0; k < kSteps; ++k, block += kPanel) {
      const __m512i even = _mm512_loadu_si512(rows[2 * k]);
      const __m512i odd = _mm512_loadu_si512(rows[2 * k + 1]);
      _mm512_storeu_si512(block, _mm512_permutex2var_epi16(even, first_pairs, odd));
      _mm512_storeu_si512(block + kPanel / 2, _mm512_permutex2var_epi16(even, last_pairs, odd));
    }
  }
  static void multiply_add(vector_t<float>& sum, uint32_t left, const Elements& right) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(left));
    sum =
        _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(right));
  }
};
#endif

template <typename Blocks>
struct VectorPanels {
  using Number = typename Blocks::Number;
  using Element = typename Blocks::Element;
  static constexpr int64_t kSteps = Blocks::kSteps;
  static constexpr int64_t kBlock = kPanel * kSteps;  // elements of a block
  // Summed over at a time: half a panel of the right operand stays in L1 as the left ones pass.
  static constexpr int64_t kDepth = 256;

  // Row i of the left operand's block.
  static void pack_left_row(const Number* numbers, int64_t i, Element* block) {
    memcpy(block + i * kSteps, numbers, kPanel * sizeof(Number));
  }
  // 32 rows of 32 numbers, summed over across the rows.
  static void pack_left_across(const Number* const* rows, Element* block) {
    Blocks::pack_across(rows, block);
  }
  static void pack_right_across(const Number* const* rows, Element* block) {
    Blocks::pack_across(rows, block);
  }
  // 32 rows of 32 numbers, summed over along them: lane j of row i becomes lane i of row j.
  static void pack_right_along(const Number* const* rows, Element* block) {
    constexpr int L = kLanes<float>;
    for (int64_t i = 0; i < kPanel; i += L) {
      for (int64_t j = 0; j < kSteps; j += L) {
        Floats part[L];
        for (int l = 0; l < L; ++l)
          memcpy(part + l, rows[i + l] + j * kPanel / kSteps, sizeof(Floats));
        transpose<float>(part);
        for (int l = 0; l < L; ++l) memcpy(block + (j + l) * kPanel + i, part + l, sizeof(Floats));
      }
    }
  }

  // c [32, 32] (+)= a b, over so many blocks of each, the left ones packed by pack_left_row,
  static void multiply(const Element* a, const Element* b, int64_t blocks, float* c,
                       int64_t row_stride, bool accumulate) {
    multiply_panel<kSteps, 1>(a, b, blocks, c, row_stride, accumulate);
  }
  // or by pack_left_across.
  static void multiply_across(const Element* a, const Element* b, int64_t blocks, float* c,
                              int64_t row_stride, bool accumulate) {
    multiply_panel<1, kPanel>(a, b, blocks, c, row_stride, accumulate);
  }

 private:
  typedef vector_t<float> Floats;
  static constexpr int kWidth = 2;  // vectors side by side
  static constexpr int64_t kColumns = kWidth * kLanes<float>;
  // Of 16 registers, or 32, as many are sums as leave room for the operands; and at least eight,
  // for a sum waits for its last addition.
  static constexpr int64_t kRows = kLanes<float> == 16 ? 12 : 6;
  static constexpr int64_t kLine = 16;  // floats
  static constexpr int64_t kTail = 8, kTailRows = kLanes<float> == 16 ? 8 : 4;
  static_assert(kPanel % kColumns == 0 && (kPanel - kTail) % kRows == 0 && kTail % kTailRows == 0);

  // In a block of the left operand the next row is kRow elements on, the next step kDeep.
  template <int64_t kRow, int64_t kDeep>
  static void multiply_panel(const Element* a, const Element* b, int64_t blocks, float* c,
                             int64_t row_stride, bool accumulate) {
    for (int64_t column = 0; column < kPanel; column += kColumns) {
      float* target = c + column;
      int64_t row = 0;
      for (; row < kPanel - kTail; row += kRows, target += kRows * row_stride) {
        multiply_rows<kRows, kRow, kDeep>(a + row * kRow, b + column, blocks, target, row_stride,
                                          accumulate);
      }
      for (; row < kPanel; row += kTailRows, target += kTailRows * row_stride) {
        multiply_rows<kTailRows, kRow, kDeep>(a + row * kRow, b + column, blocks, target,
                                              row_stride, accumulate);
      }
    }
  }

  // A function of its own: inlined, its sums would not stay in registers.
  template <int64_t kCount, int64_t kRow, int64_t kDeep>
  [[gnu::noinline]] static void multiply_rows(const Element* a, const Element* b, int64_t blocks,
                                              float* c, int64_t row_stride, bool accumulate) {
    // The result is a cache line here and one there; it is on its way while the sums are made.
    for (int64_t i = 0; i < kCount; ++i) {
      for (int64_t j = 0; j < kColumns; j += kLine) __builtin_prefetch(c + i * row_stride + j, 1);
    }
    Floats sum[kCount][kWidth];
#pragma GCC unroll 12
    for (int64_t i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kWidth; ++j) sum[i][j] = Floats{};
    }
    for (int64_t block = 0; block < blocks; ++block, a += kBlock, b += kBlock) {
      for (int64_t k = 0; k < kSteps; ++k) {
        typename Blocks::Elements right[kWidth];
#pragma GCC unroll 2
        for (int j = 0; j < kWidth; ++j) {
          memcpy(right + j, b + k * kPanel + j * kLanes<float>, sizeof(right[j]));
        }
#pragma GCC unroll 12
        for (int64_t i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < kWidth; ++j) {
            Blocks::multiply_add(sum[i][j], a[i * kRow + k * kDeep], right[j]);
          }
        }
      }
    }
    // Only now: a sum that begins with c is one chain over all panels, which rounds more.
    if (accumulate) {
      const float* before = c;
#pragma GCC unroll 12
      for (int64_t i = 0; i < kCount; ++i, before += row_stride) {
#pragma GCC unroll 2
        for (int j = 0; j < kWidth; ++j) sum[i][j] += load_vector(before + j * kLanes<float>);
      }
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < kCount; ++i, c += row_stride) {
#pragma GCC unroll 2
      for (int j = 0; j < kWidth; ++j) store_vector(c + j * kLanes<float>, sum[i][j]);
    }
  }
};

using FloatPanels = VectorPanels<FloatBlocks>;
#if defined(__AVX512BF16__)
using PairPanels = VectorPanels<PairBlocks>;
#endif

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
