// CPU kernels are compiled once per instruction set, each time in a namespace of that set's name,
// and chosen at run time.
//
// A file <op>_cpu.cpp is compiled several times with SKINFAST_ISA = baseline, avx2, ... The
// kernels are written inside `namespace skinfast::SKINFAST_ISA`; what must exist once (checks,
// allocation, registration) is written inside `#ifdef SKINFAST_HOST_CODE`, which is defined for
// the baseline pass alone. Kernel code includes no torch or container header: an inline function
// of theirs, compiled for AVX-512, could be the copy that the linker keeps for every machine.
#pragma once

namespace skinfast {

// kAmxBf16 is kAvx512Bf16, its kernels too, on a CPU that also has bfloat16 tiles.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// The best instruction set that was compiled in and that this CPU and its system support, or the
// lower one that the environment variable SKINFAST_CPU_ISA names.
Isa cpu_isa();
const char* isa_name(Isa isa);
// Whether Intel made this CPU, for which alone MKL's products are fast.
bool is_intel();

}  // namespace skinfast

#if defined(SKINFAST_X86_KERNELS)
// Declare a kernel, given as a function declaration, for every instruction set.
#define SKINFAST_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx512_bf16 {            \
  __VA_ARGS__;                       \
  }
// A pointer to the kernel for this CPU.
#define SKINFAST_KERNEL(name)                                                             \
  (::skinfast::cpu_isa() >= ::skinfast::Isa::kAvx512Bf16 ? &::skinfast::avx512_bf16::name \
   : ::skinfast::cpu_isa() == ::skinfast::Isa::kAvx512   ? &::skinfast::avx512::name      \
   : ::skinfast::cpu_isa() == ::skinfast::Isa::kAvx2     ? &::skinfast::avx2::name        \
                                                         : &::skinfast::baseline::name)
#else
#define SKINFAST_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }
#define SKINFAST_KERNEL(name) (&::skinfast::baseline::name)
#endif

// Inside a kernel: call `body` with a value of the storage type that `dtype` names.
// float16 has no CPU kernels; the host function has refused it before.
#define SKINFAST_CPU_DISPATCH(dtype, T, ...) \
  do {                                       \
    switch (dtype) {                         \
      case ::skinfast::DType::kFloat: {      \
        using T = float;                     \
        __VA_ARGS__                          \
      } break;                               \
      case ::skinfast::DType::kDouble: {     \
        using T = double;                    \
        __VA_ARGS__                          \
      } break;                               \
      default: {                             \
        using T = ::skinfast::BFloat16;      \
        __VA_ARGS__                          \
      } break;                               \
    }                                        \
  } while (false)
