// The table of contents: every op of skinfast, one line each.
// x_backward is the gradient of x; an op that writes its arguments ends in an underscore.
#include <torch/csrc/stable/library.h>

#ifndef SKINFAST_NAMESPACE
#define SKINFAST_NAMESPACE skinfast  // tests/emulation registers the same ops under another name
#endif

STABLE_TORCH_LIBRARY(SKINFAST_NAMESPACE, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool want_input, bool want_weight, "
      "bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv2d_statistics(Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> (Tensor output, Tensor statistics)");
  m.def(
      "conv2d_relu(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> Tensor");
  m.def(
      "conv2d_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_input, "
      "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv2d_add_relu(Tensor input, Tensor weight, Tensor? bias, Tensor residual, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups) -> Tensor");
  m.def(
      "conv2d_add_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_input, "
      "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, int[2] padding, "
      "int[2] pool_size) -> (Tensor output, Tensor argmax)");
  m.def(
      "conv2d_relu_max_pool2d_backward(Tensor grad_output, Tensor output, Tensor argmax, "
      "Tensor input, Tensor weight, int[2] padding, int[2] pool_size, bool want_input, "
      "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_output, Tensor input, Tensor weight, bool want_input, "
      "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_relu_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, "
      "bool want_input, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("add_relu(Tensor x, Tensor residual) -> Tensor");
  m.def("add_relu_backward(Tensor grad_output, Tensor output) -> Tensor");
  m.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, Tensor(f!)[] copies, *, float lr, "
      "Tensor? lr_tensor, "
      "float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, "
      "bool decoupled_weight_decay, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "batch_norm_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, bool training, float eps, bool relu, Tensor? statistics=None) "
      "-> (Tensor output, Tensor mask, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_relu_backward(Tensor grad_output, Tensor x, Tensor mask, Tensor mean, "
      "Tensor variance, Tensor? weight, bool training, float eps, bool needs_grad_x) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "batch_norm_add_relu(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, "
      "Tensor? running_mean, Tensor? running_var, bool training, float eps, "
      "Tensor? statistics=None) "
      "-> (Tensor output, Tensor mask, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_add_relu_backward(Tensor grad_output, Tensor x, Tensor mask, Tensor mean, "
      "Tensor variance, Tensor? weight, bool training, float eps, Tensor? other_grad_output=None) "
      "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "batch_norm_update_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
      "Tensor variance, int count, float momentum) -> ()");
  m.def(
      "batch_norm_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? running_mean, Tensor? running_var, bool training, float eps, "
      "Tensor? scale=None, Tensor? shift=None) -> (Tensor output, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_linear_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor variance, "
      "Tensor weight, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale=None, "
      "Tensor? shift=None) "
      "-> (Tensor grad_weight, Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)");
  m.def(
      "batch_norm_relu_conv2d(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? running_mean, Tensor? running_var, bool training, float eps, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool want_statistics, Tensor? statistics) "
      "-> (Tensor output, Tensor output_statistics, Tensor normalized, Tensor mask, Tensor mean, "
      "Tensor variance)");
  m.def(
      "batch_norm_relu_conv2d_backward(Tensor grad_output, Tensor normalized, Tensor weight, "
      "Tensor x, Tensor mask, Tensor mean, Tensor variance, Tensor? norm_weight, bool training, "
      "float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_input, "
      "bool want_weight) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_norm_weight, Tensor grad_norm_bias)");
  m.def(
      "max_pool2d(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode) -> (Tensor output, Tensor argmax)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor argmax, SymInt[] input_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
      "bool channels_last) -> Tensor");
  m.def(
      "batch_norm_relu_max_pool2d(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, bool training, float eps, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, bool ceil_mode) "
      "-> (Tensor output, Tensor argmax, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_relu_max_pool2d_backward(Tensor grad_output, Tensor argmax, Tensor x, "
      "Tensor mean, Tensor variance, Tensor? weight, bool training, float eps, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, bool ceil_mode, bool needs_grad_x) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("global_average_pool2d(Tensor x) -> Tensor");
  m.def(
      "global_average_pool2d_backward(Tensor grad_output, SymInt[] input_size, "
      "bool channels_last) -> Tensor");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "int reduction, float label_smoothing) "
      "-> (Tensor loss, Tensor normalizers, Tensor total_weight)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "Tensor normalizers, Tensor total_weight, int ignore_index, int reduction, "
      "float label_smoothing) -> Tensor");
  m.def(
      "classification_totals_(Tensor(a!) totals, Tensor mean_loss, Tensor logits, Tensor labels) "
      "-> ()");
  m.def(
      "image_batch(Tensor images, Tensor labels, Tensor indices, Tensor draws, Tensor clock, "
      "SymInt batch_size, Tensor scale, Tensor shift, Tensor? means, int seed, bool mirror, "
      "bool rotate, float color_jitter, str layout, ScalarType dtype) "
      "-> (Tensor output, Tensor batch_labels)");
}
