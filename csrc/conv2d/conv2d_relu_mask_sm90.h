// A node for the epilogues of CUTLASS 3: where a ReLU stopped a value it puts a zero.
#pragma once

#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

#include "core/scalar.h"

namespace skinfast {

template <typename>
struct ReLUMaskArguments {
  struct Arguments {
    const uint8_t* bits = nullptr;  // of element i of the output, row by row: i % 8 of byte i / 8
  };
};

// Its input and output are float. The output's columns are a multiple of 8.
struct ReLUMask
    : cutlass::epilogue::fusion::Sm90Compute<ReLUMaskArguments, float, float,
                                             cutlass::FloatRoundStyle::round_to_nearest> {
  using Sm90Compute::Sm90Compute;

  template <typename Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    const uint8_t* bits;
    Coordinates coordinates;  // of the thread's values, counted from its first
    int row, column;          // of that one
    int rows, columns;
    uint32_t passes = 0;  // a bit for each value of the thread in this part of the tile

    CUTLASS_DEVICE Callbacks(const uint8_t* bits, Coordinates coordinates, int row, int column,
                             int rows, int columns)
        : bits(bits),
          coordinates(coordinates),
          row(row),
          column(column),
          rows(rows),
          columns(columns) {}

    // Before the values are waited for. They lie in pairs within a row, so within a byte.
    CUTLASS_DEVICE void begin_loop(int part_m, int part_n) {
      const auto own = coordinates(cute::_, cute::_, cute::_, part_m, part_n);
      constexpr int kValues = decltype(cute::size(own))::value;
      static_assert(kValues % 2 == 0 && kValues <= 32);
      passes = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kValues; i += 2) {
        const int m = row + cute::get<0>(own(i)), n = column + cute::get<1>(own(i));
        if (m < rows && n < columns) {
          const int64_t element = static_cast<int64_t>(m) * columns + n;
          passes |= (static_cast<uint32_t>(bits[element / 8]) >> (element % 8) & 3u) << i;
        }
      }
    }

    template <typename Sum, int kWidth>
    CUTLASS_DEVICE cutlass::Array<float, kWidth> visit(const cutlass::Array<Sum, kWidth>&, int part,
                                                       int, int,
                                                       const cutlass::Array<float, kWidth>& input) {
      cutlass::Array<float, kWidth> output;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        output[i] = (passes >> (part * kWidth + i) & 1u) != 0 ? input[i] : 0.0f;
      }
      return output;
    }
  };

  template <bool kReferenceSource, typename... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    using cute::_0;
    using cute::_1;
    using cute::get;
    CUTE_STATIC_ASSERT_V(get<0>(args.tCcD(_1{})) == get<0>(args.tCcD(_0{})));
    CUTE_STATIC_ASSERT_V(get<1>(args.tCcD(_1{})) == get<1>(args.tCcD(_0{})) + _1{});
    const int rows = get<0>(args.problem_shape_mnkl), columns = get<1>(args.problem_shape_mnkl);
    // The residue is the way from the thread's first value to the end of the output.
    return Callbacks<decltype(args.tCcD)>(
        params.bits, args.tCcD, rows - static_cast<int>(get<0>(args.residue_tCcD)),
        columns - static_cast<int>(get<1>(args.residue_tCcD)), rows, columns);
  }
};

}  // namespace skinfast
