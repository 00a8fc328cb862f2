#include "recurrent.h"

#include "isa.h"

namespace fastattn {

void recurrent_forward(const RecurrentParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(recurrent_forward(p, parallel));
}
void recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                        const Parallel& parallel) {
  FASTATTN_DISPATCH(recurrent_backward(p, g, parallel));
}

}  // namespace fastattn
