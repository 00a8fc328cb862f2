#include "huge_pages.h"

#include <filesystem>
#include <fstream>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastattn {

bool balloon_reports_free_pages(const std::string& driver) {
  constexpr size_t kReporting = 5;  // VIRTIO_BALLOON_F_REPORTING
  std::error_code none;
  for (std::filesystem::directory_iterator at(driver, none), end; !none && at != end;
       at.increment(none)) {
    std::ifstream file(at->path() / "features");
    std::string bits;  // '0' or '1' each, from bit 0 on
    if (std::getline(file, bits) && bits.size() > kReporting && bits[kReporting] == '1')
      return true;
  }
  return false;
}

void ask_for_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t begin = (uintptr_t(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / kHuge * kHuge;
  if (bytes < int64_t(2 * kHuge) || begin >= end) return;
  static const bool cheap = !balloon_reports_free_pages("/sys/bus/virtio/drivers/virtio_balloon");
  if (cheap) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail
#endif
}

}  // namespace fastattn
