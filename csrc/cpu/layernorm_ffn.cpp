#include "layernorm_ffn.h"

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

void norm_forward(const NormParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(norm_forward(p, parallel));
}
void norm_backward(const NormGrads& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(norm_backward(p, parallel));
}
void act_forward(const ActParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(act_forward(p, parallel));
}
void act_backward(const ActGrads& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(act_backward(p, parallel));
}
bool ffn_serves(const FfnParams& p) { FASTATTN_DISPATCH(ffn_serves(p)); }
void ffn_forward(const FfnParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(ffn_forward(p, parallel));
}

}  // namespace fastattn
