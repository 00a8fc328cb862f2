// Opens the region of one instruction set. The including .cpp defines FASTATTN_ISA (the namespace)
// and FASTATTN_LEVEL (0 portable, 1 AVX2, 2 AVX-512, 3 AMX), then includes this, kernels, and
// target_end.h. A pragma, not -m flags: with flags the inline functions of the standard library
// would be compiled for the newer machine too, and the linker might keep that copy for all.
// No include guard: it is a bracket.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#if FASTATTN_LEVEL > 0
#include <immintrin.h>
#endif

#define FASTATTN_PRAGMA(x) _Pragma(#x)
#if FASTATTN_LEVEL == 1
#define FASTATTN_TARGET "avx2,fma,f16c"
#elif FASTATTN_LEVEL == 2
#define FASTATTN_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#elif FASTATTN_LEVEL == 3
#define FASTATTN_TARGET \
  "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"
#endif

// Lambdas do not inherit the region's target: [&](...) FASTATTN_LAMBDA { ... } in hot code.
#if FASTATTN_LEVEL > 0
#define FASTATTN_LAMBDA __attribute__((target(FASTATTN_TARGET)))
#else
#define FASTATTN_LAMBDA
#endif

#if FASTATTN_LEVEL > 0
#if defined(__clang__)
#define FASTATTN_TARGET_PUSH(t) \
  FASTATTN_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#else
#define FASTATTN_TARGET_PUSH(t) FASTATTN_PRAGMA(GCC push_options) FASTATTN_PRAGMA(GCC target(t))
#endif
FASTATTN_TARGET_PUSH(FASTATTN_TARGET)
#endif
