#include "attention.h"

#include "isa.h"

namespace fastattn {

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

void attention_forward(const AttentionParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(attention_forward(p, parallel));
}

void attention_backward(const AttentionParams& p, const AttentionGrads& g,
                        const Parallel& parallel) {
  FASTATTN_DISPATCH(attention_backward(p, g, parallel));
}

}  // namespace fastattn
