// The table of contents: every op of skinfast, one line each.
// x_backward is the gradient of x; an op that writes its arguments ends in an underscore.
#include <torch/csrc/stable/library.h>

#ifndef SKINFAST_NAMESPACE
#define SKINFAST_NAMESPACE skinfast  // tests/emulation registers the same ops under another name
#endif

STABLE_TORCH_LIBRARY(SKINFAST_NAMESPACE, m) {
  m.def("add_relu(Tensor x, Tensor residual) -> Tensor");
  m.def("add_relu_backward(Tensor grad_output, Tensor output) -> Tensor");

  m.def(
      "max_pool2d(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode) -> (Tensor output, Tensor argmax)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor argmax, SymInt[] input_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
      "bool channels_last) -> Tensor");

  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "int reduction, float label_smoothing) "
      "-> (Tensor loss, Tensor normalizers, Tensor total_weight)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "Tensor normalizers, Tensor total_weight, int ignore_index, int reduction, "
      "float label_smoothing) -> Tensor");
}
