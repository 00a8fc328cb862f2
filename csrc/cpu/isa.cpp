#include "isa.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastattn {
namespace {

#if defined(__x86_64__)

uint64_t xcr0() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

// Tile state must be asked for once a process, or the first tile instruction traps.
bool request_amx() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

unsigned detect() {
  unsigned found = 1u << int(Isa::kPortable);
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave) return found;
  const uint64_t state = xcr0();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  if (!(ymm && fma && f16c && (b >> 5 & 1))) return found;
  found |= 1u << int(Isa::kAvx2);
  // F, DQ, BW, VL
  if (!(zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1))) return found;
  found |= 1u << int(Isa::kAvx512);
  const bool tiles = (d >> 24 & 1) && (d >> 22 & 1) && (state & 0x60000) == 0x60000;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  if (tiles && (a >> 5 & 1) && request_amx()) found |= 1u << int(Isa::kAmx);
  return found;
}

#else
unsigned detect() { return 1u << int(Isa::kPortable); }
#endif

#if defined(__x86_64__)
bool amd_with_bf16() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != 0x68747541) return false;  // "Auth"enticAMD
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

std::atomic<int>& forced() {
  static std::atomic<int> value{-1};
  return value;
}

}  // namespace

unsigned isas_available() {
  static const unsigned mask = detect();
  return mask;
}

Isa current_isa() {
  const int chosen = forced().load(std::memory_order_relaxed);
  if (chosen >= 0) return Isa(chosen);
  static const int best = [] {
    int i = kIsaCount - 1;
    while (!(isas_available() >> i & 1)) --i;
    return i;
  }();
  return Isa(best);
}

bool fp32_multiplies_faster() {
#if defined(__x86_64__)
  static const bool amd = amd_with_bf16();
  return !amd && current_isa() != Isa::kAmx;
#else
  return false;
#endif
}

bool force_isa(Isa isa) {
  if (int(isa) < 0 || int(isa) >= kIsaCount || !(isas_available() >> int(isa) & 1)) return false;
  forced().store(int(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace fastattn
