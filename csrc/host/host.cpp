// The module skinfast._host: facts about the build and the CPU, free of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "core/isa.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", SKINFAST_BUILD_COMPILER},
      {"cpu_instruction_sets", SKINFAST_BUILD_ISAS},
      {"cuda", SKINFAST_BUILD_CUDA},
      {"cutlass", SKINFAST_BUILD_CUTLASS},
      {"torch", SKINFAST_BUILD_TORCH},
  };
}

std::string cpu_instruction_set() { return skinfast::isa_name(skinfast::cpu_isa()); }

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the build and the CPU.";
  m.def("build_info", &build_info,
        "What was built: compiler, cpu_instruction_sets, cuda (version and architectures, or why "
        "not), cutlass (its version, or why not), torch (the version compiled against).");
  m.def("cpu_instruction_set", &cpu_instruction_set,
        "The instruction set whose kernels run on this CPU.");
}
