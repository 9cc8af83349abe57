// The module skinfast._host: facts about the build and the CPU, and the random numbers of the
// kernels, free of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "conv2d/conv2d_choices.h"
#include "core/isa.h"
#include "core/philox.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", SKINFAST_BUILD_COMPILER}, {"cpu_instruction_sets", SKINFAST_BUILD_ISAS},
      {"cuda", SKINFAST_BUILD_CUDA},         {"cutlass", SKINFAST_BUILD_CUTLASS},
      {"torch", SKINFAST_BUILD_TORCH},
  };
}

std::string cpu_instruction_set() { return skinfast::isa_name(skinfast::cpu_isa()); }

bool chooses_conv2d_statistics(const std::string& wish, const std::string& device,
                               const std::array<int64_t, 13>& v, bool of_gradient) {
  using namespace skinfast;
  const TensorCoreConv2d conv{v[0], v[1], v[2], v[3],  v[4],  v[5], v[6],
                              v[7], v[8], v[9], v[10], v[11], v[12]};
  const Conv2dOperation operation =
      of_gradient ? Conv2dOperation::kInputGradientStatistics : Conv2dOperation::kForwardStatistics;
  return usable_kernel(kConv2dChoices, wish, device, /*has_persistent_kernels=*/true, operation,
                       DType::kBFloat16, conv) != Conv2dKernel::kCudnn;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, uint64_t key) {
  const skinfast::PhiloxWords words =
      skinfast::philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
  return {words.values[0], words.values[1], words.values[2], words.values[3]};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the build and the CPU, and the random numbers of the kernels.";
  m.def("build_info", &build_info,
        "What was built: compiler, cpu_instruction_sets, cuda (version and architectures, or why "
        "not), cutlass (its version, or why not), torch (the version compiled against).");
  m.def("cpu_instruction_set", &cpu_instruction_set,
        "The instruction set whose kernels run on this CPU.");
  m.def(
      "chooses_conv2d_statistics", &chooses_conv2d_statistics, pybind11::arg("wish"),
      pybind11::arg("device"), pybind11::arg("sizes"), pybind11::arg("of_gradient"),
      "Whether a device that has the persistent kernels has one give the statistics of this "
      "convolution in bfloat16 too, of its output or of its input's gradient: by the kernel's name "
      "or, where that is empty, by the table of choices. Sizes: N, C, H, W, K, R, S, P, Q, "
      "strides, "
      "paddings.");
  m.def("philox", &philox, pybind11::arg("counter"), pybind11::arg("key"),
        "Philox4x32-10: the four 32-bit words that belong to a counter under a 64-bit key.");
}
