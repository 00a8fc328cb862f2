// The CPU kernels of one op, of one instruction set (ISA): what its binding calls, for mutants of
// test_mutations_op.py. STEP: those of recurrent_step.cpp; CACHE: those of decoder_layer.cpp;
// PRODUCTS: those of products.cpp; INPUTS: those of recurrent.cpp; else those of encoder_layer.cpp.
// The passes of a layer are compiled beside this.
#ifdef STEP
#define FASTATTN_ISA ISA
#define FASTATTN_LEVEL 0
#include "layernorm_ffn.h"
#include "recurrent.h"
#include "recurrent_step.h"
#include "team.h"
#include "target_begin.h"

#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "rows.h"
#include "activation.h"
#include "recurrent_cell.h"
#include "lstm.h"
#include "gru.h"
#include "recurrent_products.h"
#include "recurrent_plan.h"

namespace fastattn {
namespace ISA {
template <class T>
struct As {
  using type = T;
};
}  // namespace ISA
}  // namespace fastattn
#include "recurrent_step_rows.h"

#include "target_end.h"

namespace fastattn {
void recurrent_step_forward(const StepParams& p, const Parallel& parallel) {
  ISA::recurrent_step_forward(p, parallel);
}
void recurrent_step_backward(const StepParams& p, const StepGrads& g, const Parallel& parallel) {
  ISA::recurrent_step_backward(p, g, parallel);
}
}  // namespace fastattn

#else
#include "isa.h"
#undef FASTATTN_DISPATCH
#define FASTATTN_DISPATCH(call) return ISA::call
#ifdef CACHE
#include "attention_kv_cache.cpp"
#elif defined(INPUTS)
#include "recurrent.cpp"
#elif !defined(PRODUCTS)
#include "attention.cpp"
#endif
#include "layernorm_ffn.cpp"

bool fastattn::fp32_multiplies_faster() { return true; }
#endif

#include "huge_pages.cpp"
#include "scratch.cpp"
