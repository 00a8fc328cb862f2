// Cases of csrc/cuda/attention_kv_cache.h. Tensors as in the op's schema; o, lse and the caches are
// written. The scratch is the launcher's own. `multiprocessors` of the GPU that the plan is for;
// `splits`: what it must come to.
#include "../../../../csrc/cuda/attention_kv_cache.h"

#include <memory>

#include "attention_case.h"

namespace fastattn::cuda {

namespace {

KVCache cache_of(Case& c) {
  KVCache cache;
  cache.entries = static_cast<int>(c.tensor("k_cache").sizes[0]);
  cache.cache_lens = integers(c, "cache_lens"), cache.new_lens = integers(c, "new_lens");
  cache.index = integers(c, "cache_index"), cache.table = integers(c, "block_table");
  if (cache.table.ptr) {
    cache.columns = static_cast<int>(c.tensor("block_table").sizes[1]);
    cache.page_size = static_cast<int>(c.tensor("k_cache").sizes[2]);
  }
  if (Tensor* k = c.find("k")) {
    cache.Sn = static_cast<int>(k->sizes[2]);
    cache.k = operand(*k), cache.v = operand(c.tensor("v"));
  }
  if (Tensor* cos = c.find("cos")) {
    cache.positions = static_cast<int>(cos->sizes[0]), cache.half = static_cast<int>(cos->sizes[1]);
    cache.cos = cos->data<float>(), cache.sin = c.data<float>("sin");
  }
  cache.interleaved = c.integer("interleaved") != 0;
  return cache;
}

}  // namespace

FASTATTN_EMU_LAUNCHER(attention_kv_cache) {
  AttentionKVCacheParams params;
  params.cache = cache_of(c);
  AttentionParams& p = params.attention;
  Tensor &q = c.tensor("q"), &k = c.tensor("k_cache"), &v = c.tensor("v_cache");
  p.B = static_cast<int>(q.sizes[0]), p.H = static_cast<int>(q.sizes[1]);
  p.Sq = static_cast<int>(q.sizes[2]), p.D = static_cast<int>(q.sizes[3]);
  p.Hk = static_cast<int>(k.sizes[1]), p.Dv = static_cast<int>(v.sizes[3]);
  p.Sk = static_cast<int>(k.sizes[2]) * (params.cache.table.ptr ? params.cache.columns : 1);
  p.dtype = dtype_of(q);
  p.q = operand(q), p.k = operand(k), p.v = operand(v), p.o = operand(c.tensor("o"));
  p.lse = c.data<float>("lse");
  p.mask = broadcast(c, "mask");
  if (Tensor* slopes = c.find("alibi_slopes")) {
    p.alibi = slopes->data<float>();
    p.alibi_b = slopes->sizes.size() == 2 ? slopes->strides[0] : 0;
  }
  p.sinks = c.data<float>("sinks");
  p.scale = static_cast<float>(c.real("scale")), p.softcap = static_cast<float>(c.real("softcap"));
  p.causal = c.integer("causal") ? Causal::kBottomRight : Causal::kNone;
  p.window_left = static_cast<int>(c.integer("window_left"));
  p.window_right = static_cast<int>(c.integer("window_right"));
  const AttentionKVCachePlan plan =
      attention_kv_cache_plan(params, static_cast<int>(c.integer("multiprocessors")));
  if (plan.splits != c.integer("splits")) return cudaErrorNotSupported;
  // Of exactly that many floats, full of NaN.
  const auto scratch = std::make_unique<float[]>(static_cast<size_t>(plan.scratch));
  for (int64_t i = 0; i < plan.scratch; ++i) scratch[static_cast<size_t>(i)] = __builtin_nanf("");
  return attention_kv_cache(params, plan, scratch.get(), nullptr).error;
}

}  // namespace fastattn::cuda
