#include "recurrent.h"

#include "isa.h"
#include "recurrent_step.h"

namespace fastattn {

void recurrent_forward(const RecurrentParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(recurrent_forward(p, parallel));
}
void recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                        const Parallel& parallel) {
  FASTATTN_DISPATCH(recurrent_backward(p, g, parallel));
}

void recurrent_step_forward(const StepParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(recurrent_step_forward(p, parallel));
}
void recurrent_step_backward(const StepParams& p, const StepGrads& g, const Parallel& parallel) {
  FASTATTN_DISPATCH(recurrent_step_backward(p, g, parallel));
}

}  // namespace fastattn
