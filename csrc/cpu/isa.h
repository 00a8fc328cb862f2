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
// 0.72 against 0.18 ns an instruction), older machines convert what they read. Not AMD's since
// Zen 4.
bool fp32_multiplies_faster();

}  // namespace fastattn

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
