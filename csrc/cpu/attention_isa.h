// The entry points of one instruction set: which engine serves which dtype. Included inside
// target_begin.h / target_end.h.
#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "amx.h"
#include "attention_rows.h"
#include "attention_engine.h"
#include "attention_fwd.h"
#include "attention_probs.h"
#include "attention_grad_engine.h"
#include "attention_grad_plan.h"
#include "attention_bwd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class E>
void forward_and_weights(const AttentionParams& p, const Parallel& parallel) {
  if (few_rows(p))
    forward<FmaEngine>(p, parallel, true);
  else
    forward<E>(p, parallel, false);
  if (p.weights_mode != Weights::kNone) write_weights<E>(p, parallel);
}

void attention_forward(const AttentionParams& p, const Parallel& parallel) {
#if FASTATTN_LEVEL >= 3
  if (p.dtype == DType::kBf16) return forward_and_weights<AmxEngine>(p, parallel);
#endif
  forward_and_weights<FmaEngine>(p, parallel);
}

void attention_backward(const AttentionParams& p, const AttentionGrads& g,
                        const Parallel& parallel) {
#if FASTATTN_LEVEL >= 3
  if (p.dtype == DType::kBf16) return backward<AmxEngine, AmxGradEngine>(p, g, parallel);
#endif
  backward<FmaEngine, FmaGradEngine>(p, g, parallel);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
