// torch.ops.fastattn.attention_kv_cache on the CPU: allocation, launch. Stable ABI only.

#include <tuple>

#include "attention_kv_cache_call.h"

namespace {

using fastattn::AttentionParams;
using namespace fastattn::binding;

std::tuple<Tensor, Tensor> attention_kv_cache(Tensor q, Tensor k_cache, Tensor v_cache,
                                              Tensor cache_lens, Opt k, Opt v, Opt new_lens,
                                              Opt block_table, Opt cache_index, Opt cos, Opt sin,
                                              Opt mask, Opt alibi_slopes, Opt sinks, double scale,
                                              double softcap, bool causal, int64_t window_left,
                                              int64_t window_right, bool interleaved) {
  KVCacheCall call({q,       k_cache,  v_cache,      cache_lens,   k,
                    v,       new_lens, block_table,  cache_index,  cos,
                    sin,     mask,     alibi_slopes, sinks,        scale,
                    softcap, causal,   window_left,  window_right, interleaved});
  AttentionParams& a = call.a;
  Tensor o = empty_as(empty_strided, q, a.Dv);
  Tensor lse = empty(empty_strided, {a.B, a.H, a.Sq}, aoti_torch_dtype_float32());
  a.o = unit(o);
  a.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  a.lse_s = 1, a.lse_h = a.Sq, a.lse_b = a.H * a.Sq;
  fastattn::attention_kv_cache(call.p, threads());
  return {o, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_kv_cache", TORCH_BOX(&attention_kv_cache));
}
