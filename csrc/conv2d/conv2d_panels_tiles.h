// Products of panels on a CPU's bfloat16 tiles (Intel AMX). Included inside CPU kernel files only,
// where the compiler knows tiles.
//
// A float32 is the sum of three bfloat16, eight bits of the significand each, exactly. Of the nine
// products of the parts of two numbers the three smallest are below 2^-26 of the whole, less than a
// float32 product loses by rounding; the other six are accumulated in float32. So the result is as
// close as that of float32 multiply-adds, and a tile multiplies sixteen times as fast as a vector.
// (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations, 2019.) An infinity becomes NaN, for it has no parts.
#pragma once

#include "conv2d/conv2d_panels.h"
#include "core/transpose.h"

namespace skinfast::SKINFAST_ISA {
namespace {  // a copy for each file: no symbol that the linker could share

// While one exists, its thread's tiles are set up.
class TilePanels {
 public:
  using Number = float;
  using Element = uint32_t;               // a pair of bfloat16
  static constexpr int64_t kDepth = 512;  // summed over at a time

 private:
  static constexpr int kParts = 3;
  static constexpr int kSide = 16;                 // rows of a tile; its columns are pairs
  static constexpr int64_t kTile = kSide * kSide;  // pairs in a tile

 public:
  static constexpr int64_t kBlock = kParts * 2 * kTile;  // pairs in 32 rows of 32 numbers, in parts

  TilePanels() {
    const Configuration configuration;
    _tile_loadconfig(&configuration);
  }
  ~TilePanels() { _tile_release(); }
  TilePanels(const TilePanels&) = delete;
  TilePanels& operator=(const TilePanels&) = delete;

  // Row i of the left operand's block: 32 numbers that are summed over.
  static void pack_left_row(const float* numbers, int64_t i, uint32_t* block) {
    Pairs parts[kParts];
    split(load_vector(numbers), load_vector(numbers + kSide), parts);
    for (int part = 0; part < kParts; ++part) {
      memcpy(block + i * kSide + part * 2 * kTile, &parts[part], sizeof(Pairs));
    }
  }
  // 32 rows of 32 numbers that are summed over across the rows.
  static void pack_left_across(const float* const* rows, uint32_t* block) {
    pack_across<true>(rows, block);
  }
  static void pack_right_across(const float* const* rows, uint32_t* block) {
    pack_across<false>(rows, block);
  }
  // 32 rows of 32 numbers that are summed over along the row.
  static void pack_right_along(const float* const* rows, uint32_t* block) {
    for (int half = 0; half < 2; ++half) {
      Pairs parts[kParts][kSide];
      for (int i = 0; i < kSide; ++i) {
        const float* row = rows[half * kSide + i];
        Pairs split_row[kParts];
        split(load_vector(row), load_vector(row + kSide), split_row);
        for (int part = 0; part < kParts; ++part) parts[part][i] = split_row[part];
      }
      store_half<true>(parts, half, block);
    }
  }

#define SKINFAST_LOAD_LEFT(part)                    \
  _tile_loadd(4, a + ((part) * 2 + 0) * kTile, 64); \
  _tile_loadd(5, a + ((part) * 2 + 1) * kTile, 64)
#define SKINFAST_LOAD_RIGHT(part)                   \
  _tile_loadd(6, b + ((part) * 2 + 0) * kTile, 64); \
  _tile_loadd(7, b + ((part) * 2 + 1) * kTile, 64)
#define SKINFAST_MULTIPLY() \
  _tile_dpbf16ps(0, 4, 6);  \
  _tile_dpbf16ps(1, 4, 7);  \
  _tile_dpbf16ps(2, 5, 6);  \
  _tile_dpbf16ps(3, 5, 7)

  // c [32, 32] (+)= a b, over so many blocks of each, the left ones packed by pack_left_across,
  static void multiply_across(const uint32_t* a, const uint32_t* b, int64_t blocks, float* c,
                              int64_t row_stride, bool accumulate) {
    multiply(a, b, blocks, c, row_stride, accumulate);
  }
  // or by pack_left_row, which gives the same block. The small products first.
  static void multiply(const uint32_t* a, const uint32_t* b, int64_t blocks, float* c,
                       int64_t row_stride, bool accumulate) {
    const int64_t bytes = row_stride * static_cast<int64_t>(sizeof(float));
    float* lower = c + kSide * row_stride;
    if (accumulate) {
      _tile_loadd(0, c, bytes);
      _tile_loadd(1, c + kSide, bytes);
      _tile_loadd(2, lower, bytes);
      _tile_loadd(3, lower + kSide, bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t block = 0; block < blocks; ++block, a += kBlock, b += kBlock) {
      SKINFAST_LOAD_LEFT(0);
      SKINFAST_LOAD_RIGHT(2);
      SKINFAST_MULTIPLY();
      SKINFAST_LOAD_RIGHT(1);
      SKINFAST_MULTIPLY();
      SKINFAST_LOAD_LEFT(1);
      SKINFAST_MULTIPLY();
      SKINFAST_LOAD_RIGHT(0);
      SKINFAST_MULTIPLY();
      SKINFAST_LOAD_LEFT(2);
      SKINFAST_MULTIPLY();
      SKINFAST_LOAD_LEFT(0);
      SKINFAST_MULTIPLY();
    }
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + kSide, bytes);
    _tile_stored(2, lower, bytes);
    _tile_stored(3, lower + kSide, bytes);
  }

#undef SKINFAST_LOAD_LEFT
#undef SKINFAST_LOAD_RIGHT
#undef SKINFAST_MULTIPLY

 private:
  typedef uint32_t Pairs __attribute__((vector_size(64)));
  typedef vector_t<float> Floats;

  // All tiles: 16 rows of 64 bytes.
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  // The number's first eight bits, rounded; in the upper half of a lane.
  static Pairs leading(Floats value) {
    return (reinterpret_cast<Pairs>(value) + 0x8000u) & 0xffff0000u;
  }

  // Two vectors in parts; a lane holds a part of `low` in its lower half and of `high` in its
  // upper. Operands pair numbers k and k + 16 of 32: any order serves a sum, if both have the same.
  static void split(Floats low, Floats high, Pairs* parts) {
    for (int part = 0; part < kParts - 1; ++part) {
      const Pairs a = leading(low), b = leading(high);
      parts[part] = (a >> 16) | b;
      low -= reinterpret_cast<Floats>(a);
      high -= reinterpret_cast<Floats>(b);
    }
    // What is left has eight bits at most.
    parts[kParts - 1] =
        (reinterpret_cast<Pairs>(low) >> 16) | (reinterpret_cast<Pairs>(high) & 0xffff0000u);
  }

  // One half of a block: sixteen rows of `parts`, turned over where kTurned.
  template <bool kTurned>
  static void store_half(Pairs (*parts)[kSide], int half, uint32_t* block) {
    for (int part = 0; part < kParts; ++part) {
      Floats* rows = reinterpret_cast<Floats*>(parts[part]);
      if constexpr (kTurned) transpose<float>(rows);
      memcpy(block + (part * 2 + half) * kTile, rows, kTile * sizeof(uint32_t));
    }
  }

  template <bool kTurned>
  static void pack_across(const float* const* rows, uint32_t* block) {
    for (int half = 0; half < 2; ++half) {
      Pairs parts[kParts][kSide];
      for (int i = 0; i < kSide; ++i) {
        Pairs split_row[kParts];
        split(load_vector(rows[i] + half * kSide), load_vector(rows[i + kSide] + half * kSide),
              split_row);
        for (int part = 0; part < kParts; ++part) parts[part][i] = split_row[part];
      }
      store_half<kTurned>(parts, half, block);
    }
  }
};

}  // namespace
}  // namespace skinfast::SKINFAST_ISA
