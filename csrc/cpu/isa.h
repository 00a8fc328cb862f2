// Which instruction set the kernels run on, found at run time and overridable for tests.
#pragma once

namespace fastattn {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };
inline constexpr int kIsaCount = 4;

// Bit i is set where this CPU, this operating system and this build can run Isa(i).
unsigned isas_available();

// The one in use: the best available, or what force_isa chose.
Isa current_isa();

// Process-wide. False (and no change) where the instruction set is not available.
bool force_isa(Isa isa);

// Whether fp32 matrices are multiplied faster than 16-bit ones: x86 without tiles in use. Intel's
// product of bf16 pairs (vdpbf16ps) makes half the products of an FMA in the same time (measured:
// 0.72 against 0.18 ns an instruction), older machines convert what they read. AMD's since Zen 4,
// whose product of pairs is said to be as fast as an FMA, were not measured: what the library does
// there stays.
bool fp32_multiplies_faster();

}  // namespace fastattn

// Declarations of entry points, one set in each instruction set's namespace.
#define FASTATTN_IN_EVERY_ISA(...) \
  namespace portable {             \
  __VA_ARGS__                      \
  }                                \
  namespace avx2 {                 \
  __VA_ARGS__                      \
  }                                \
  namespace avx512 {               \
  __VA_ARGS__                      \
  }                                \
  namespace amx {                  \
  __VA_ARGS__                      \
  }

// The body of an entry point: its namesake in the namespace of the instruction set in use.
#if defined(__x86_64__)
#define FASTATTN_DISPATCH(call) \
  switch (current_isa()) {      \
    case Isa::kAmx:             \
      return amx::call;         \
    case Isa::kAvx512:          \
      return avx512::call;      \
    case Isa::kAvx2:            \
      return avx2::call;        \
    default:                    \
      return portable::call;    \
  }
#else
#define FASTATTN_DISPATCH(call) return portable::call
#endif
