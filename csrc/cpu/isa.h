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

}  // namespace fastattn
