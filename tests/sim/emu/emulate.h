// CUDA's names for the host compiler: csrc/cuda/platform.cuh includes this where FASTATTN_EMULATE
// is defined. Kernels then are plain functions, run a fiber a thread by the runtime beside this
// file.
#pragma once

#include <vector_functions.h>

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "device.h"

// --- keywords ------------------------------------------------------------------------------------
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
// A variable of the block cannot be had from a C++ declaration: FASTATTN_STATIC_SHARED.
#define __shared__ static_assert(false, "the emulator needs FASTATTN_STATIC_SHARED(type, name)");

#define threadIdx (::fastattn::emu::here().thread)
#define blockIdx (::fastattn::emu::here().block)
#define blockDim (::fastattn::emu::here().block_dim)
#define gridDim (::fastattn::emu::here().grid_dim)
constexpr int warpSize = 32;

#define FASTATTN_DYNAMIC_SHARED(name) unsigned char* const name = ::fastattn::emu::dynamic_shared()
#define FASTATTN_STATIC_SHARED(type, name)                                               \
  auto& name = *static_cast<std::type_identity_t<type>*>(::fastattn::emu::static_shared( \
      sizeof(type), alignof(type), ::fastattn::emu::Site::current()))
#define FASTATTN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::fastattn::emu::launch_kernel<false>(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)
#define FASTATTN_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  ::fastattn::emu::launch_kernel<true>(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)

namespace fastattn::emu {

template <bool cooperative, class... P, class... A>
void launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t, A&&... a) {
  // Converted once, as a launch converts them; every thread then gets copies.
  const std::tuple<std::remove_cv_t<P>...> args(std::forward<A>(a)...);
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared, cooperative,
         [&] { std::apply(kernel, args); });
}

// A value in 32-bit words, as shuffles move it.
template <class T, class F>
T by_words(T value, F f) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof(T));
  for (size_t i = 0; i < (sizeof(T) + 3) / 4; ++i) words[i] = f(words[i]);
  std::memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace fastattn::emu

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute what, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), what, value);
}

// --- barriers ------------------------------------------------------------------------------------
#define FASTATTN_EMU_SITE ::fastattn::emu::Site site = ::fastattn::emu::Site::current()

inline void __syncthreads(FASTATTN_EMU_SITE) {
  fastattn::emu::block_barrier(fastattn::emu::Vote::kNone, 0, site);
}
inline int __syncthreads_and(int p, FASTATTN_EMU_SITE) {
  return fastattn::emu::block_barrier(fastattn::emu::Vote::kAnd, p, site);
}
inline int __syncthreads_or(int p, FASTATTN_EMU_SITE) {
  return fastattn::emu::block_barrier(fastattn::emu::Vote::kOr, p, site);
}
inline int __syncthreads_count(int p, FASTATTN_EMU_SITE) {
  return fastattn::emu::block_barrier(fastattn::emu::Vote::kCount, p, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTATTN_EMU_SITE) {
  fastattn::emu::sync_warp(mask, site);
}

// --- warp ----------------------------------------------------------------------------------------
template <class T>
T __shfl_sync(unsigned mask, T x, int lane, int width = 32, FASTATTN_EMU_SITE) {
  return fastattn::emu::by_words(x, [&](uint32_t w) {
    return fastattn::emu::shuffle(fastattn::emu::Shuffle::kIndex, mask, w, lane, width, site);
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, FASTATTN_EMU_SITE) {
  return fastattn::emu::by_words(x, [&](uint32_t w) {
    return fastattn::emu::shuffle(fastattn::emu::Shuffle::kUp, mask, w, static_cast<int>(delta),
                                  width, site);
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, FASTATTN_EMU_SITE) {
  return fastattn::emu::by_words(x, [&](uint32_t w) {
    return fastattn::emu::shuffle(fastattn::emu::Shuffle::kDown, mask, w, static_cast<int>(delta),
                                  width, site);
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, FASTATTN_EMU_SITE) {
  return fastattn::emu::by_words(x, [&](uint32_t w) {
    return fastattn::emu::shuffle(fastattn::emu::Shuffle::kXor, mask, w, lanes, width, site);
  });
}
inline unsigned __ballot_sync(unsigned mask, int p, FASTATTN_EMU_SITE) {
  return fastattn::emu::ballot(mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, FASTATTN_EMU_SITE) {
  return fastattn::emu::ballot(mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, FASTATTN_EMU_SITE) {
  return fastattn::emu::ballot(mask, p == 0, site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x, FASTATTN_EMU_SITE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return fastattn::emu::match_any(mask, bits, site);
}
template <class T>
T __reduce_add_sync(unsigned mask, T x, FASTATTN_EMU_SITE) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return static_cast<T>(fastattn::emu::reduce(fastattn::emu::Reduce::kAdd, std::is_signed_v<T>,
                                              mask, static_cast<uint32_t>(x), site));
}
template <class T>
T __reduce_min_sync(unsigned mask, T x, FASTATTN_EMU_SITE) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return static_cast<T>(fastattn::emu::reduce(fastattn::emu::Reduce::kMin, std::is_signed_v<T>,
                                              mask, static_cast<uint32_t>(x), site));
}
template <class T>
T __reduce_max_sync(unsigned mask, T x, FASTATTN_EMU_SITE) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return static_cast<T>(fastattn::emu::reduce(fastattn::emu::Reduce::kMax, std::is_signed_v<T>,
                                              mask, static_cast<uint32_t>(x), site));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x, FASTATTN_EMU_SITE) {
  return fastattn::emu::reduce(fastattn::emu::Reduce::kAnd, false, mask, x, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x, FASTATTN_EMU_SITE) {
  return fastattn::emu::reduce(fastattn::emu::Reduce::kOr, false, mask, x, site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned x, FASTATTN_EMU_SITE) {
  return fastattn::emu::reduce(fastattn::emu::Reduce::kXor, false, mask, x, site);
}

#include "emulate_atomic.h"
#include "emulate_math.h"
