// CUDA's atomics, fences and cached loads for the emulator. Only one fiber runs at a time, so a
// load and a store make an atomic; both are relaxed atomics to ThreadSanitizer, which thereby still
// sees a plain access that races with them. Order comes from the runtime (order.cpp).
#pragma once

#include <vector_types.h>

#include <cstring>
#include <type_traits>

#include "device.h"

namespace fastattn::emu {

template <class T, class F>
T atomic_update(T* p, F f, Order order, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  atomic_begin(p, sizeof(T), site);
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  T now = f(old);
  __atomic_store(p, &now, __ATOMIC_RELAXED);
  atomic_end(p, Access::kReadModifyWrite, order, std::memcmp(&old, &now, sizeof(T)) != 0);
  return old;
}

template <class T>
T atomic_load(const T* p, Order order, Site site) {
  atomic_begin(p, sizeof(T), site);
  T value;
  __atomic_load(p, &value, __ATOMIC_RELAXED);
  atomic_end(p, Access::kLoad, order, false);
  return value;
}

template <class T>
void atomic_store(T* p, T value, Order order, Site site) {
  atomic_begin(p, sizeof(T), site);
  __atomic_store(p, &value, __ATOMIC_RELAXED);
  atomic_end(p, Access::kStore, order, true);
}

template <class T>
T read_only(const T* p) {
  load_read_only(p, sizeof(T));
  return *p;
}

template <class T>
using Same = std::type_identity_t<T>;

}  // namespace fastattn::emu

#define FASTATTN_EMU_ATOMIC(name, expression)                                     \
  template <class T>                                                              \
  T name(T* p, fastattn::emu::Same<T> x,                                          \
         fastattn::emu::Site site = fastattn::emu::Site::current()) {             \
    return fastattn::emu::atomic_update(                                          \
        p, [&](T old) -> T { return expression; }, fastattn::emu::Order{}, site); \
  }
FASTATTN_EMU_ATOMIC(atomicAdd, old + x)
FASTATTN_EMU_ATOMIC(atomicSub, old - x)
FASTATTN_EMU_ATOMIC(atomicExch, (static_cast<void>(old), x))
FASTATTN_EMU_ATOMIC(atomicMax, old < x ? x : old)
FASTATTN_EMU_ATOMIC(atomicMin, x < old ? x : old)
FASTATTN_EMU_ATOMIC(atomicAnd, old& x)
FASTATTN_EMU_ATOMIC(atomicOr, old | x)
FASTATTN_EMU_ATOMIC(atomicXor, old ^ x)
FASTATTN_EMU_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
FASTATTN_EMU_ATOMIC(atomicDec, old == 0 || old > x ? x : old - 1)
#undef FASTATTN_EMU_ATOMIC

template <class T>
T atomicCAS(T* p, fastattn::emu::Same<T> compare, fastattn::emu::Same<T> value,
            fastattn::emu::Site site = fastattn::emu::Site::current()) {
  return fastattn::emu::atomic_update(
      p, [&](T old) { return old == compare ? value : old; }, fastattn::emu::Order{}, site);
}

inline void __threadfence_block() { fastattn::emu::fence(fastattn::emu::Scope::kBlock); }
inline void __threadfence() { fastattn::emu::fence(fastattn::emu::Scope::kDevice); }
inline void __threadfence_system() { fastattn::emu::fence(fastattn::emu::Scope::kDevice); }
inline void __nanosleep(unsigned, fastattn::emu::Site site = fastattn::emu::Site::current()) {
  fastattn::emu::nap(site);
}

// ld.global.nc: what it reads must stay as it is for the whole kernel.
template <class T>
T __ldg(const T* p) {
  return fastattn::emu::read_only(p);
}
// Cache hints that change no value.
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, fastattn::emu::Same<T> x) {
  *p = x;
}
template <class T>
void __stcs(T* p, fastattn::emu::Same<T> x) {
  *p = x;
}
