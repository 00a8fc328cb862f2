// The entry point of one instruction set. Included inside target_begin.h / target_end.h.
#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "amx.h"
#include "attention_rows.h"
#include "attention_engine.h"
#include "attention_fwd.h"
#include "attention_kv_cache_rows.h"
#include "attention_kv_cache_engine.h"
#include "attention_kv_cache_tiles.h"
#include "attention_kv_cache_fwd.h"

namespace fastattn {
namespace FASTATTN_ISA {

void attention_kv_cache(const AttentionKVCacheParams& p, const Parallel& parallel) {
  append_and_attend(p, parallel);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
