// What a block does with its sums: output = acc + bias + residual, through a ReLU if wanted.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include "core/relu.h"

namespace skinfast {

// An output operator for CUTLASS's EpilogueWithBroadcast. The sum is rounded to the output's type
// once, after the ReLU. A missing bias is handed over as zeros.
template <typename Element, int kWidth>
class BiasResidualReLU {
 public:
  using ElementOutput = Element;
  using ElementC = Element;
  using ElementZ = Element;
  using ElementT = Element;
  using ElementVector = Element;
  using ElementAccumulator = float;
  using ElementCompute = float;
  static constexpr int kElementsPerAccess = kWidth;
  static constexpr int kCount = kWidth;
  static constexpr bool kIsSingleSource = true;
  static constexpr bool kIsHeavy = false;
  static constexpr bool kStoreZ = true;
  static constexpr bool kStoreT = false;

  using FragmentOutput = cutlass::Array<Element, kWidth>;
  using FragmentCompute = cutlass::Array<float, kWidth>;

  struct Params {
    bool has_residual, with_relu;
  };

  CUTLASS_HOST_DEVICE explicit BiasResidualReLU(const Params& params) : params_(params) {}

  CUTLASS_HOST_DEVICE bool is_source_needed() const { return params_.has_residual; }
  // Slices of the sum would need the ReLU to wait for the last one: they are not used.
  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}

  CUTLASS_HOST_DEVICE void operator()(FragmentOutput& output, FragmentOutput&,
                                      const FragmentCompute& sums, const FragmentOutput& residual,
                                      const FragmentCompute& bias) const {
    FragmentCompute values;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kWidth; ++i) values[i] = sums[i] + bias[i] + float(residual[i]);
    finish(output, values);
  }

  CUTLASS_HOST_DEVICE void operator()(FragmentOutput& output, FragmentOutput&,
                                      const FragmentCompute& sums,
                                      const FragmentCompute& bias) const {
    FragmentCompute values;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kWidth; ++i) values[i] = sums[i] + bias[i];
    finish(output, values);
  }

 private:
  CUTLASS_HOST_DEVICE void finish(FragmentOutput& output, FragmentCompute& values) const {
    if (params_.with_relu) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kWidth; ++i) values[i] = relu(values[i]);
    }
    output = cutlass::NumericArrayConverter<Element, float, kWidth>()(values);
  }

  Params params_;
};

// The same ReLU for CUTLASS 3, which adds bias and residual by itself. Values: an array of float.
struct OptionalReLUArguments {
  bool with_relu = false;
};
template <typename Values>
struct OptionalReLU {
  using Arguments = OptionalReLUArguments;
  CUTLASS_HOST_DEVICE Values operator()(Values values, const Arguments& arguments) const {
    if (arguments.with_relu) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < static_cast<int>(Values::kElements); ++i) values[i] = relu(values[i]);
    }
    return values;
  }
};

}  // namespace skinfast
