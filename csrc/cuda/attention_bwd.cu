// Attention backward: P is recomputed a tile at a time from q, k and lse (Dao et al., 2205.14135).
//
//   delta = rowsum(do * o) - dlse + rowsum(dweights * weights)
//   P = exp(logits - lse);  dv += dropout(P)^T do
//   dP = dropout(do v^T + dweights);  dS = P * (dP - delta)
//   dbias += dS;  dq += scale dS k;  dk += scale dS^T q;  dsinks -= sum exp(sink - lse) delta
//
// q, dq (B, H, Sq, D), k, dk (B, Hk, Sk, D), v, dv (B, Hk, Sk, Dv), o, do (B, H, Sq, Dv), or
// packed.
//
// Two passes: dk and dv by blocks of keys (a block owns a kv head's keys and walks the heads of the
// group and their rows in order), dq by blocks of rows. Seven products where one pass needs five,
// and no sum has two owners: the result is bitwise repeatable. With dq_sums the first pass also
// adds dq into fp32 memory as it goes: five products, and the order of a sum is a matter of timing.
// 2 H Sq Sk (3 D + 2 Dv) FLOPs in one pass, (4 D + 3 Dv) in two.
//
// A bias gradient goes where its shape lets one owner have it:
//   kStore   no two tiles share an element: the pass by rows writes dS itself
//   kKeys    one row of bias for all rows: sums over rows in the pass by keys, (B, H, Sk)
//   kRows    one column for all keys: sums over keys in the pass by rows, (B, H, Sq)
//   kShared  heads or batch entries share an (Sq, Sk) slice: a kernel of its own, a block a tile
// and what is left to sum of kKeys and kRows (over heads, batch, all) is small, and the caller's.
// With dq_sums the pass by keys takes any of them, by atomics where it is no owner.
//
// Scratch: delta (fp32) and lse as a tile's logits are measured (lse_in_units; +inf for a row
// without keys, so that its P is 0), both laid out as lse.
#include "attention_grad.cuh"

namespace fastattn::cuda {

Launch attention_backward(const AttentionParams& p, const AttentionGrads& g, cudaStream_t stream) {
  const GradCall c(p, g);
  const bool fused = g.dq_sums != nullptr;
  const BiasGrad mode = g.dbias ? g.dbias_mode : BiasGrad::kNone;
  const auto only = [&](bool here) { return here ? mode : BiasGrad::kNone; };
  const BiasGrad keys = only(fused || mode == BiasGrad::kKeys);
  const BiasGrad rows = only(!fused && (mode == BiasGrad::kStore || mode == BiasGrad::kRows));
  Launch out;
  const auto then = [&](bool wanted, auto launched) {
    if (wanted && out.error == cudaSuccess) out = launched();
  };
  then(true, [&] { return launch_prepare(c, stream); });
  then(g.dweights.ptr, [&] { return launch_weights_delta(c, stream); });
  then(g.dk.ptr || g.dv.ptr || keys != BiasGrad::kNone,
       [&] { return launch_by_keys(c, keys, stream); });
  then((g.dq.ptr && !fused) || rows != BiasGrad::kNone,
       [&] { return launch_by_rows(c, rows, stream); });
  then(mode == BiasGrad::kShared && !fused, [&] { return launch_shared_bias(c, stream); });
  then(g.dsinks, [&] { return launch_dsinks(c, stream); });
  then(g.dq.ptr && fused, [&] { return launch_dq_of_sums(c, stream); });
  return out;
}

int attention_backward_variants(VariantInfo* out, int capacity) {
  int n = 0;
  for (const auto part : {list_prepare, list_weights_delta, list_by_keys, list_by_rows,
                          list_shared_bias, list_dsinks, list_dq_of_sums})
    n += n < capacity ? part(out + n, capacity - n) : part(nullptr, 0);
  return n;
}

}  // namespace fastattn::cuda
