// The entry points of one instruction set. Included inside target_begin.h / target_end.h.
#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "amx.h"
#include "rows.h"
#include "activation.h"
#include "layernorm_rows.h"
#include "bias_act.h"
#include "cross_entropy_rows.h"
#include "ffn_few_rows.h"
#include "ffn_tiles.h"

namespace fastattn {
namespace FASTATTN_ISA {

bool ffn_serves(const FfnParams& p) {
#if FASTATTN_LEVEL >= 3
  // Saving the hidden layer means transposing it, which many rows do not pay for.
  const bool saves = p.u.ptr || p.a.ptr;
  if (ffn_tiles_serve(p) && !(saves && p.M > 256)) return true;
#endif
  return p.M <= few_rows(false);
}

void ffn_forward(const FfnParams& p, const Parallel& parallel) {
#if FASTATTN_LEVEL >= 3
  if (ffn_tiles_serve(p) && p.M > few_rows(true)) return ffn_tiles(p, parallel);
#endif
  ffn_few_rows(p, parallel);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
