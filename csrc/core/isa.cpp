#include "core/isa.h"

#include <cstdlib>
#include <cstring>

namespace skinfast {
namespace {

Isa best_isa() {
#if defined(SKINFAST_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("SKINFAST_CPU_ISA");
  if (wish == nullptr) return best;
  for (int i = 0; i < static_cast<int>(best); ++i) {
    if (std::strcmp(wish, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
  }
  return best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace skinfast
