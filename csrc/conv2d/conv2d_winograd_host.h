// A 3x3 convolution and its gradients by minimal filtering: when, memory, threads.
#pragma once

#include "conv2d/conv2d.h"
#include "conv2d/conv2d_winograd.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace skinfast {

struct WinogradProducts {
  WinogradConv2d conv;

  explicit WinogradProducts(const PatchConv2d& of) : conv{of.N, of.H, of.W, of.C, of.K} {}

  // Of a convolution that panels can compute. On maps of 2x2, taps left out save as much; and with
  // few tiles the transform of the weights is not worth it.
  static bool can(const PatchConv2d& of) {
    constexpr int64_t kFewestTiles = 64;
    return cpu_isa() != Isa::kAmxBf16 && of.R == 3 && of.S == 3 && of.stride_h == 1 &&
           of.stride_w == 1 && of.pad_h == 1 && of.pad_w == 1 && of.H % 2 == 0 && of.W % 2 == 0 &&
           of.H >= 4 && of.W >= 4 && of.C <= WinogradConv2d::kMostChannels &&
           of.K <= WinogradConv2d::kMostChannels && of.N * of.H * of.W >= 4 * kFewestTiles;
  }

  void forward(const Tensor& x, const Tensor& weight, const Tensor& output) const {
    products(conv, false, x, weight, output);
  }

  void input_gradient(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_x) const {
    products({conv.N, conv.H, conv.W, conv.K, conv.C}, true, grad_output, weight, grad_x);
  }

  void weight_gradient(const Tensor& grad_output, const Tensor& x,
                       const Tensor& grad_weight) const {
    const Tensor sums = torch::stable::new_empty(x, {conv.weight_elements()});
    const auto sum = SKINFAST_KERNEL(winograd_weight_sums);
    parallel_for(kWinogradComponents * conv.K / kPanel, 1, [&](int64_t begin, int64_t end) {
      sum(conv, floats(grad_output), floats(x), mutable_floats(sums), begin, end,
          thread_scratch(conv.sums_scratch()));
    });
    const auto transform = SKINFAST_KERNEL(winograd_weight_gradient);
    parallel_for(conv.K, kPanel, [&](int64_t begin, int64_t end) {
      transform(conv, floats(sums), mutable_floats(grad_weight), begin, end);
    });
  }

 private:
  // `from` maps of from.C channels to from.K.
  void products(const WinogradConv2d& from, bool is_input_gradient, const Tensor& map,
                const Tensor& weight, const Tensor& result) const {
    const Tensor transformed = torch::stable::new_empty(map, {conv.weight_elements()});
    const auto transform = SKINFAST_KERNEL(winograd_transform_weight);
    parallel_for(conv.K / kPanel * conv.C / kPanel, 1, [&](int64_t begin, int64_t end) {
      transform(conv, is_input_gradient, floats(weight), mutable_floats(transformed), begin, end,
                thread_scratch(kWinogradWeightScratch));
    });
    const auto kernel = SKINFAST_KERNEL(winograd_products);
    parallel_for(from.row_panels(), 1, [&](int64_t begin, int64_t end) {
      kernel(from, floats(map), floats(transformed), mutable_floats(result), begin, end,
             thread_scratch(from.products_scratch()));
    });
  }
};

}  // namespace skinfast
