// The table of contents: every op of skinfast, one line each.
// x_backward is the gradient of x; an op that writes its arguments ends in an underscore.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(skinfast, m) {
  m.def("add_relu(Tensor x, Tensor residual) -> Tensor");
  m.def("add_relu_backward(Tensor grad_output, Tensor output) -> Tensor");
}
