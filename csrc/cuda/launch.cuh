// One launch of one compiled variant of a kernel, for launchers that choose theirs from a table.
#pragma once

#include "platform.cuh"
#include "variant.h"

namespace fastattn::cuda {

// A compiled kernel and what it is: a line of a launcher's table.
template <typename... Args>
struct Variant : VariantInfo {
  void (*function)(Args...);
};

template <typename Variant, int kCount>
int list(const Variant (&variants)[kCount], VariantInfo* out, int capacity) {
  for (int i = 0; i < kCount && i < capacity; ++i) out[i] = variants[i];
  return kCount;
}

// The grid of a launch and its kernel's leave to so much shared memory; whether both may be.
template <typename... Args>
bool prepare_launch(Launch& out, const Variant<Args...>& v, int64_t blocks) {
  out.block = unsigned(v.threads), out.shared = unsigned(v.shared);
  if (blocks > INT32_MAX) {
    out.error = cudaErrorInvalidConfiguration;
    return false;
  }
  out.grid = unsigned(blocks);
  out.error = cudaFuncSetAttribute(reinterpret_cast<const void*>(v.function),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared);
  if (out.error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
  return out.error == cudaSuccess;
}

// Blocks in x alone: y and z end at 65535.
template <typename... Args>
void launch(Launch& out, const Variant<Args...>& v, int64_t blocks, cudaStream_t stream,
            const Args&... args) {
  if (!prepare_launch(out, v, blocks)) return;
  FASTATTN_LAUNCH(v.function, out.grid, out.block, size_t(v.shared), stream, args...);
  out.error = cudaGetLastError();
}

// The same with all blocks resident at once, or cudaErrorCooperativeLaunchTooLarge.
template <typename... Args>
void launch_together(Launch& out, const Variant<Args...>& v, int64_t blocks, cudaStream_t stream,
                     const Args&... args) {
  if (!prepare_launch(out, v, blocks)) return;
  FASTATTN_LAUNCH_COOPERATIVE(v.function, out.grid, out.block, size_t(v.shared), stream, args...);
  out.error = cudaGetLastError();
}

}  // namespace fastattn::cuda
