// What emulated device code calls: the border between the kernels, which are instrumented, and the
// runtime, which is not. emulate*.h give these functions the names that CUDA uses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <source_location>

namespace fastattn::emu {

using Site = std::source_location;

struct Coordinates {
  uint3 thread{}, block{};
  dim3 block_dim, grid_dim;
};
const Coordinates& here();

// Ends the program with a report that names `kind`, the calling thread and where every other is.
[[noreturn]] void fault(const char* kind, Site site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// --- block ---------------------------------------------------------------------------------------
enum class Vote { kNone, kAnd, kOr, kCount };
int block_barrier(Vote vote, int predicate, Site site);
unsigned char* dynamic_shared();
// One object of the block for each declaration (site), poisoned at first sight.
void* static_shared(size_t bytes, size_t alignment, Site site);

// --- warp: lanes of `mask` meet; only sync_warp orders memory ------------------------------------
enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
void sync_warp(uint32_t mask, Site site);
uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, int operand, int width, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
uint32_t match_any(uint32_t mask, uint64_t value, Site site);
uint32_t reduce(Reduce op, bool is_signed, uint32_t mask, uint32_t value, Site site);
// rows[i]: where row lane / 4 (transposed: 2 (lane % 4)) of matrix i starts, for the caller to
// read.
void ldmatrix_rows(uint32_t address, int matrices, const unsigned char* (&rows)[8], bool transposed,
                   Site site);
enum class Mma { kBf16, kF16, kTf32 };
void mma(Mma type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);

// --- asynchronous copies and shared addresses ----------------------------------------------------
uint32_t shared_address(const void* p, Site site);
void cp_async(uint32_t dst, const void* src, unsigned bytes, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(unsigned in_flight, Site site);

// --- atomics and fences --------------------------------------------------------------------------
enum class Scope { kBlock = 0, kDevice = 1 };
enum class Access { kLoad, kStore, kReadModifyWrite };
struct Order {
  bool acquire = false, release = false;
};
// Before the access: lets other threads run, checks alignment.
void atomic_begin(const void* p, unsigned bytes, Site site);
// After it; `changed`: memory holds another value now.
void atomic_end(const void* p, Access access, Order order, bool changed);
void fence(Scope scope);
// ld.global.nc: must not be written by anyone during the kernel, ordered or not.
void load_read_only(const void* p, unsigned bytes);
void nap(Site site);

// --- launches ------------------------------------------------------------------------------------
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared,
            bool cooperative, const std::function<void()>& body);

}  // namespace fastattn::emu
