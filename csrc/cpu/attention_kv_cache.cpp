#include "attention_kv_cache.h"

#include "isa.h"

namespace fastattn {

void attention_kv_cache(const AttentionKVCacheParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(attention_kv_cache(p, parallel));
}

}  // namespace fastattn
