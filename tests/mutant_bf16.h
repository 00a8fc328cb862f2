// Arrays of a mutant's caller, all of floats, as the kernels of AMX want them.
#pragma once

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>
#include <vector>

// A float array as bf16 while this lives: an argument's values are cut to it (they fit), a result's
// are put back as floats.
class Half {
 public:
  Half(float* wide, int64_t n, bool result)
      : wide_(wide), result_(result), half_(wide ? size_t(n) : 0) {
    for (size_t i = 0; !result && i < half_.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, wide + i, 4);
      half_[i] = uint16_t(bits >> 16);
    }
  }
  ~Half() {
    for (size_t i = 0; result_ && i < half_.size(); ++i) {
      const uint32_t bits = uint32_t(half_[i]) << 16;
      std::memcpy(wide_ + i, &bits, 4);
    }
  }
  Half(const Half&) = delete;
  Half& operator=(const Half&) = delete;

  void* data() { return wide_ ? half_.data() : nullptr; }

 private:
  float* wide_;
  bool result_;
  std::vector<uint16_t> half_;
};

// The kernel may use AMX only in a process that asked for it.
inline void ask_for_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#endif
}
