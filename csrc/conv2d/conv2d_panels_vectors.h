// Products of panels of 32 rows and 32 columns by multiply-adds in vectors. Included inside CPU
// kernel files only.
//
// The left operand is stored in blocks of 32 rows of 32 numbers that are summed over, or turned
// over where it comes so, the right one in blocks of 32 such numbers by 32 columns: what a step of
// the sum needs lies in a few cache lines.
#pragma once

#include "conv2d/conv2d_panels.h"
#include "core/transpose.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // a copy for each file: no symbol that the linker could share

struct VectorPanels {
  using Element = float;
  static constexpr int64_t kBlock = kPanel * kPanel;  // elements of a block
  // Summed over at a time: half a panel of the right operand stays in L1 as the left ones pass.
  static constexpr int64_t kDepth = 256;

  // Row i of the left operand's block.
  static void pack_left_row(const float* numbers, int64_t i, float* block) {
    memcpy(block + i * kPanel, numbers, kPanel * sizeof(float));
  }
  // 32 rows of 32 numbers, summed over across the rows: stored as they are.
  static void pack_left_across(const float* const* rows, float* block) {
    for (int64_t i = 0; i < kPanel; ++i) pack_left_row(rows[i], i, block);
  }
  static void pack_right_across(const float* const* rows, float* block) {
    pack_left_across(rows, block);
  }
  // 32 rows of 32 numbers, summed over along them.
  static void pack_right_along(const float* const* rows, float* block) { turn_over(rows, block); }

  // c [32, 32] (+)= a b, over so many blocks of each, the left ones packed by pack_left_row,
  static void multiply(const float* a, const float* b, int64_t blocks, float* c, int64_t row_stride,
                       bool accumulate) {
    multiply_panel<kPanel, 1>(a, b, blocks, c, row_stride, accumulate);
  }
  // or by pack_left_across.
  static void multiply_across(const float* a, const float* b, int64_t blocks, float* c,
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

  // In a block of the left operand the next row is kRow numbers on, the next one summed over kDeep.
  template <int64_t kRow, int64_t kDeep>
  static void multiply_panel(const float* a, const float* b, int64_t blocks, float* c,
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
  [[gnu::noinline]] static void multiply_rows(const float* a, const float* b, int64_t blocks,
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
      for (int64_t k = 0; k < kPanel; ++k) {
        Floats right[kWidth];
#pragma GCC unroll 2
        for (int j = 0; j < kWidth; ++j) {
          right[j] = load_vector(b + k * kPanel + j * kLanes<float>);
        }
#pragma GCC unroll 12
        for (int64_t i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < kWidth; ++j) sum[i][j] += a[i * kRow + k * kDeep] * right[j];
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

  // Lane j of row i of the block becomes lane i of row j.
  static void turn_over(const float* const* rows, float* block) {
    constexpr int L = kLanes<float>;
    for (int64_t i = 0; i < kPanel; i += L) {
      for (int64_t j = 0; j < kPanel; j += L) {
        Floats part[L];
        for (int l = 0; l < L; ++l) part[l] = load_vector(rows[i + l] + j);
        transpose<float>(part);
        for (int l = 0; l < L; ++l) store_vector(block + (j + l) * kPanel + i, part[l]);
      }
    }
  }
};

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
