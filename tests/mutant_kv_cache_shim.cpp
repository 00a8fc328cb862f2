// Attention over a cache in fp32 or bf16, as a library of its own, for test_mutations_kv_cache.py:
// one C entry point, compiled against a copy of csrc/cpu with a bug planted.
#include "attention_kv_cache_portable.cpp"
#include "scratch.cpp"

namespace {

using namespace fastattn;

// One worker after the other.
void run_workers(int n, void (*fn)(void* ctx, int worker), void* ctx) {
  for (int w = 0; w < n; ++w) fn(ctx, w);
}

// Everything is 8 bytes wide. Null = absent. Tensors are contiguous, fp32, bool or int64; rows and
// caches (void) of bf16 where `bf16` says so.
// mutant_kv_cache.py holds the same list.
struct MutantKVCache {
  int64_t B, H, Hk, Sq, Sn, D, Dv, slots, columns, ragged, half, interleaved, causal, left, right,
      alibi_b, threads, bf16;
  double scale, softcap;
  int64_t *cache_lens, *new_lens, *block_table, *cache_index;
  uint8_t* mask;  // (B, H, Sq, capacity)
  void *q, *k_cache, *v_cache, *k, *v, *o;
  float *cos, *sin, *alibi, *sinks, *lse;
};

Operand heads(void* ptr, int64_t h, int64_t s, int64_t d) { return {ptr, h * s * d, s * d, d, 1}; }

}  // namespace

// Returns 0, or 1 where `size` says that the caller has another struct.
extern "C" __attribute__((visibility("default"))) int mutant_run(const MutantKVCache* call,
                                                                 int64_t size) {
  if (size != int64_t(sizeof(MutantKVCache))) return 1;
  const MutantKVCache& c = *call;
  AttentionKVCacheParams p;
  AttentionParams& a = p.attention;
  a.dtype = c.bf16 ? DType::kBf16 : DType::kF32;
  a.B = c.B, a.H = c.H, a.Hk = c.Hk, a.Sq = c.Sq, a.D = c.D, a.Dv = c.Dv;
  a.Sk = c.block_table ? c.slots * c.columns : c.slots;
  a.q = heads(c.q, c.H, c.Sq, c.D), a.o = heads(c.o, c.H, c.Sq, c.Dv);
  a.k = heads(c.k_cache, c.Hk, c.slots, c.D), a.v = heads(c.v_cache, c.Hk, c.slots, c.Dv);
  a.lse = c.lse, a.lse_s = 1, a.lse_h = c.Sq, a.lse_b = c.H * c.Sq;
  if (c.mask) a.mask = {c.mask, DType::kBool, c.H * c.Sq * a.Sk, c.Sq * a.Sk, a.Sk, 1};
  a.alibi = c.alibi, a.alibi_b = c.alibi_b, a.sinks = c.sinks;
  a.scale = float(c.scale), a.softcap = float(c.softcap);
  a.causal = c.causal ? Causal::kBottomRight : Causal::kNone;
  a.window_left = c.left, a.window_right = c.right;
  p.cache_len = c.cache_lens, p.new_len = c.new_lens, p.ragged = c.ragged, p.Sn = c.Sn;
  p.new_k = heads(c.k, c.Hk, c.Sn, c.D), p.new_v = heads(c.v, c.Hk, c.Sn, c.Dv);
  if (c.cache_index) p.cache_index = {c.cache_index, true, 1, 0};
  if (c.block_table) p.block_table = {c.block_table, true, c.columns, 1}, p.page_size = c.slots;
  p.cos = c.cos, p.sin = c.sin, p.half = c.half, p.interleaved = c.interleaved;
  Parallel parallel;
  parallel.threads = int(c.threads), parallel.run = run_workers;
  portable::attention_kv_cache(p, parallel);
  return 0;
}
