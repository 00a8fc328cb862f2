#include "attention.h"

#include "isa.h"

namespace fastattn {

void attention_forward(const AttentionParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(attention_forward(p, parallel));
}

void attention_backward(const AttentionParams& p, const AttentionGrads& g,
                        const Parallel& parallel) {
  FASTATTN_DISPATCH(attention_backward(p, g, parallel));
}

}  // namespace fastattn
