// A convolution and its gradients as sums over taps in panels: sizes, tasks, threads.
#pragma once

#include <algorithm>

#include "conv2d/conv2d.h"
#include "conv2d/conv2d_panels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace skinfast {

// The convolution of `conv`, whose kernel is the taps from (first_r, first_s) on of [kernel_r,
// kernel_s].
struct PanelProducts {
  PatchConv2d conv;
  int64_t first_r, first_s, kernel_r, kernel_s;

  // There are no half panels; and more taps would only be more code. On Intel's CPUs MKL's products
  // are fast: there panels are for float32 on tiles alone.
  static bool can(const PatchConv2d& conv, DType dtype) {
    return is_fast(dtype) && conv.C % kPanel == 0 && conv.K % kPanel == 0 &&
           conv.R * conv.S <= PanelConv2d::kMaxTaps;
  }

  void forward(const Tensor& x, const Tensor& weight, const Tensor& output) const {
    const PanelTarget target{conv.P, conv.Q, 1, 1, 0, 0, conv.K};
    run(sum_of_patches(), target, conv.K, SKINFAST_KERNEL(panel_conv2d), x, weight, output);
  }

  void input_gradient(const Tensor& grad_output, const Tensor& weight, Tensor grad_x) const {
    // Behind the last tap, and between the taps of a kernel shorter than its stride, is nothing.
    const int64_t bottom = std::min(conv.H, (conv.P - 1) * conv.stride_h + conv.R - conv.pad_h);
    const int64_t right = std::min(conv.W, (conv.Q - 1) * conv.stride_w + conv.S - conv.pad_w);
    if (bottom < conv.H || right < conv.W || conv.R < conv.stride_h || conv.S < conv.stride_w) {
      torch::stable::zero_(grad_x);
    }
    // Pixels a stride apart have the same taps above them.
    for (int64_t h = 0; h < std::min(conv.stride_h, bottom); ++h) {
      for (int64_t w = 0; w < std::min(conv.stride_w, right); ++w) {
        PanelConv2d sum{conv.N,
                        conv.P,
                        conv.Q,
                        conv.K,
                        (bottom - h + conv.stride_h - 1) / conv.stride_h,
                        (right - w + conv.stride_w - 1) / conv.stride_w,
                        1,
                        1,
                        kernel_r * kernel_s * conv.C,
                        0,
                        {}};
        for (int64_t r = 0; r < conv.R; ++r) {
          for (int64_t s = 0; s < conv.S; ++s) {
            const int64_t p = h + conv.pad_h - r, q = w + conv.pad_w - s;
            if (p % conv.stride_h != 0 || q % conv.stride_w != 0) continue;
            sum.tap[sum.taps++] = {p / conv.stride_h, q / conv.stride_w, weights_at(r, s)};
          }
        }
        const PanelTarget target{conv.H, conv.W, conv.stride_h, conv.stride_w, h, w, conv.C};
        run(sum, target, conv.C, SKINFAST_KERNEL(panel_input_gradient), grad_output, weight,
            grad_x);
      }
    }
  }

  void weight_gradient(const Tensor& grad_output, const Tensor& x,
                       const Tensor& grad_weight) const {
    const PanelConv2d sum = sum_of_patches();
    const auto kernel = SKINFAST_KERNEL(panel_weight_gradient);
    in_ranges(conv.K / kPanel, sum.taps * conv.C / kPanel, [&](const PanelRange& range) {
      kernel(dtype_of(x), sum, conv.K, range, grad_output.const_data_ptr(), x.const_data_ptr(),
             grad_weight.mutable_data_ptr(), thread_scratch(scratch(dtype_of(x), range)));
    });
  }

 private:
  static bool is_fast(DType dtype) {
    if (dtype == DType::kBFloat16) return cpu_isa() == Isa::kAvx512Bf16 && !is_intel();
    return dtype == DType::kFloat &&
           (cpu_isa() == Isa::kAmxBf16 || (cpu_isa() >= Isa::kAvx2 && !is_intel()));
  }

  static int64_t scratch(DType dtype, const PanelRange& range) {
    if (dtype == DType::kFloat) return kPanelScratch;
    const int64_t rows = std::min(kPackedRows / kPanel, range.row_end - range.row_begin);
    return kPanelScratch + 4 * rows * (range.column_end - range.column_begin) * kPanel * kPanel;
  }

  int64_t weights_at(int64_t r, int64_t s) const {
    return ((first_r + r) * kernel_s + first_s + s) * conv.C;
  }

  PanelConv2d sum_of_patches() const {
    PanelConv2d sum{conv.N,
                    conv.H,
                    conv.W,
                    conv.C,
                    conv.P,
                    conv.Q,
                    conv.stride_h,
                    conv.stride_w,
                    kernel_r * kernel_s * conv.C,
                    0,
                    {}};
    for (int64_t r = 0; r < conv.R; ++r) {
      for (int64_t s = 0; s < conv.S; ++s) {
        sum.tap[sum.taps++] = {r - conv.pad_h, s - conv.pad_w, weights_at(r, s)};
      }
    }
    return sum;
  }

  template <typename Kernel>
  static void run(const PanelConv2d& sum, const PanelTarget& target, int64_t columns, Kernel kernel,
                  const Tensor& map, const Tensor& weight, const Tensor& result) {
    in_ranges((sum.rows() + kPanel - 1) / kPanel, columns / kPanel, [&](const PanelRange& range) {
      kernel(dtype_of(map), sum, target, range, map.const_data_ptr(), weight.const_data_ptr(),
             result.mutable_data_ptr(), thread_scratch(scratch(dtype_of(map), range)));
    });
  }

  // Threads divide the rows or the columns, whichever leaves less to be packed by each of them;
  // packing a number of the right operand takes twice as long.
  template <typename Task>
  static void in_ranges(int64_t rows, int64_t columns, const Task& task) {
    if (rows >= 2 * columns) {
      parallel_for(rows, 1,
                   [&](int64_t begin, int64_t end) { task(PanelRange{begin, end, 0, columns}); });
    } else {
      parallel_for(columns, 1,
                   [&](int64_t begin, int64_t end) { task(PanelRange{0, rows, begin, end}); });
    }
  }
};

}  // namespace skinfast
