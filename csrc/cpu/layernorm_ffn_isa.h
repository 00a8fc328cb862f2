// The entry points of one instruction set. Included inside target_begin.h / target_end.h.
#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "amx.h"
#include "rows.h"
#include "activation.h"
#include "layernorm_rows.h"
#include "bias_act.h"
#include "cast_rows.h"
#include "cross_entropy_rows.h"
#include "few_tokens_rows.h"
#include "ffn_few_tokens.h"
#include "ffn_few_rows.h"
#include "ffn_blocks.h"
#include "ffn_panels.h"
#include "ffn_tiles.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A kernel that cuts rows alone wants a panel of them for every thread; the library cuts columns.
inline bool blocks_serve(const FfnParams& p, int threads) { return p.M >= 32 * int64_t(threads); }
#if FASTATTN_LEVEL >= 2
inline bool panels_serve(const FfnParams& p, int threads) {
  return PanelProducts::serve(p) && p.M >= PanelProducts::kWidth && blocks_serve(p, threads);
}
#endif

bool ffn_serves(const FfnParams& p, int threads) {
  // Saving the hidden layer means transposing it, which many rows do not pay for.
  [[maybe_unused]] const bool pays = !(p.u.ptr || p.a.ptr) || p.M <= 256;
#if FASTATTN_LEVEL >= 3
  if (TileProducts::serve(p) && blocks_serve(p, threads) && pays) return true;
#endif
#if FASTATTN_LEVEL >= 2
  if (panels_serve(p, threads) && pays) return true;
#endif
  return p.M <= few_rows(false) || ffn_few_tokens_serve(p);
}

void ffn_forward(const FfnParams& p, const Parallel& parallel) {
#if FASTATTN_LEVEL >= 3
  if (TileProducts::serve(p) && p.M > few_rows(true))
    return ffn_by_blocks<TileProducts>(p, parallel);
#endif
#if FASTATTN_LEVEL >= 2
  if (panels_serve(p, parallel.threads)) return ffn_by_blocks<PanelProducts>(p, parallel);
#endif
  if (ffn_few_tokens_serve(p)) return ffn_few_tokens(p, parallel);
  ffn_few_rows(p, parallel);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
