// torch.ops.fastattn.decoder_layer on the CPU: a pre-norm transformer decoder layer over a KV
// cache, a few new tokens of every sequence, in one op where Python would run a dozen.
//
//   h = x + Wo attention(Wq n, [cached keys, Wk n], [cached values, Wv n]), n = norm1(x)
//   y = h + ffn(norm2(h))
//
// Nothing here computes: the projections are aten::linear, the rest are the kernels of attention
// over a cache and of the norm pass and the op layernorm_ffn. q, k and v are read where the
// projections put them. What it saves is the framework's time between the parts, which for one
// token is longer than theirs. Everything is checked before anything is written.

#include "attention_kv_cache_call.h"
#include "layer_parts.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "decoder_layer";

// Heads [first, first + heads) of the columns of x (B, n, columns), as (B, heads, n, D).
Tensor heads_of(const Tensor& x, int64_t first, int64_t heads, int64_t D) {
  const int64_t n = x.size(1), width = x.size(2);
  const int64_t sizes[] = {x.size(0), heads, n, D}, strides[] = {n * width, D, width, 1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 4, sizes, strides, first * D, &handle));
  return Tensor(handle);
}

struct Attention {
  Tensor wq;  // without wk, wv: all three, one under the other
  Opt bq, wk, bk, wv, bv;
  Opt mask, cos, sin;
  int64_t H;
  double scale;

  // Of the rows n (B, rows, E), which are appended to the caches; (B, rows, H D).
  Tensor of(const Tensor& n, const Tensor& k_cache, const Tensor& v_cache,
            const Tensor& cache_lens) const {
    STD_TORCH_CHECK(k_cache.dim() == 4, "fastattn::", kOp,
                    ": k_cache must have shape (B, Hk, S, D), got ", text(k_cache));
    const int64_t Hk = k_cache.size(1), D = k_cache.size(3);
    const auto check = [&](const Tensor& w, int64_t rows) {
      STD_TORCH_CHECK(w.size(0) == rows, "fastattn::", kOp, ": a projection must have ", rows,
                      " rows, got ", text(w));
    };
    check(wq, wk ? H * D : (H + 2 * Hk) * D);
    if (wk) check(*wk, Hk * D), check(*wv, Hk * D);
    const Tensor all = linear(n, wq, bq);
    const Tensor q = heads_of(all, 0, H, D);
    const Tensor k = wk ? heads_of(linear(n, *wk, bk), 0, Hk, D) : heads_of(all, H, Hk, D);
    const Tensor v = wv ? heads_of(linear(n, *wv, bv), 0, Hk, D) : heads_of(all, H + Hk, Hk, D);
    const Opt none, new_k = k, new_v = v;
    // A finished mask says everything, causality too.
    KVCacheCall c({q,    k_cache, v_cache, cache_lens, new_k, new_v, none,  none, none, none,
                   none, mask,    none,    none,       scale, 0.,    !mask, -1,   -1,   false});
    STD_TORCH_CHECK(c.a.Dv == D, "fastattn::", kOp, ": the caches must have one head_dim");
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "fastattn::", kOp,
                    ": cos and sin must come together");
    if (cos) c.set_rotary_of_rows(*cos, *sin);
    const int64_t B = n.size(0), rows = n.size(1);
    const Tensor o = empty({B, rows, H * D}, c.a.dtype), lse = empty({B, H, rows}, DType::kF32);
    c.a.o = unit(heads_of(o, 0, H, D)), c.a.lse = static_cast<float*>(data(lse));
    c.a.lse_s = 1, c.a.lse_h = rows, c.a.lse_b = H * rows;
    attention_kv_cache(c.p, threads());
    return o;
  }
};

Tensor decoder_layer(Tensor x, Tensor k_cache, Tensor v_cache, Tensor cache_lens, Opt mask, Opt cos,
                     Opt sin, Tensor wq, Opt bq, Opt wk, Opt bk, Opt wv, Opt bv, Tensor wo, Opt bo,
                     Opt norm1_weight, Opt norm1_bias, Tensor w1, Opt b1, Tensor w2, Opt b2,
                     Opt w_gate, Opt b_gate, Opt norm2_weight, Opt norm2_bias, int64_t H,
                     double scale, int64_t norm, double eps1, double eps2, int64_t act,
                     bool by_columns) {
  STD_TORCH_CHECK(x.dim() == 3, "fastattn::", kOp, ": x must have shape (B, rows, E), got ",
                  text(x));
  STD_TORCH_CHECK(wk.has_value() == wv.has_value(), "fastattn::", kOp,
                  ": wk and wv must come together");
  STD_TORCH_CHECK(norm >= 1 && norm <= 2 && act >= 0 && act <= 5 && H > 0, "fastattn::", kOp,
                  ": norm, act or heads out of range");
  const DType dtype = row_dtype(kOp, x, "x");
  const auto check = [&](const Tensor& w) {
    STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), "fastattn::", kOp,
                    ": weights must have x's dtype");
    STD_TORCH_CHECK(w.dim() == 2 && w.numel() > 0, "fastattn::", kOp,
                    ": weights must have shape (out, in) and elements, got ", text(w));
  };
  if (by_columns) {  // (in, out), as Conv1D stores them
    for (Tensor* w : {&wq, &wo, &w1, &w2})
      if (w->dim() == 2) *w = transposed(*w);
    for (Opt* w : {&wk, &wv, &w_gate})
      if (*w && (*w)->dim() == 2) *w = transposed(**w);
  }
  const int64_t E = x.size(2), M = x.size(0) * x.size(1);
  check(wq), check(wo), check(w1), check(w2);
  for (const Opt* w : {&wk, &wv, &w_gate})
    if (*w) check(**w);
  STD_TORCH_CHECK(wo.size(0) == E && w2.size(0) == E && w1.size(1) == E && w1.size(0) == w2.size(1),
                  "fastattn::", kOp, ": wo, w1 and w2 must go with x's ", E, " features, got ",
                  text(wo), ", ", text(w1), ", ", text(w2));
  const auto check_vec = [&](const Opt& v, int64_t n, const char* name) {
    STD_TORCH_CHECK(!v || v->numel() == n, "fastattn::", kOp, ": ", name, " must have ", n,
                    " elements");
  };
  const int64_t F = w1.size(0);
  STD_TORCH_CHECK(!w_gate || shape_of(*w_gate) == shape_of(w1), "fastattn::", kOp,
                  ": w_gate must have w1's shape ", text(w1));
  check_vec(bo, E, "bo"), check_vec(b1, F, "b1"), check_vec(b2, E, "b2");
  check_vec(b_gate, F, "b_gate"), check_vec(norm2_weight, E, "norm2_weight");
  check_vec(norm2_bias, E, "norm2_bias");
  if (M == 0) return empty(shape_of(x), dtype);
  x = torch::stable::contiguous(x);
  NormParams p;
  p.M = M, p.N = E, p.x = rows_of(x, E, dtype), p.norm = Norm(norm), p.eps = float(eps1);
  p.weight = vec(kOp, norm1_weight, E, "norm1_weight");
  p.shift = vec(kOp, norm1_bias, E, "norm1_bias");
  const Tensor n = empty(shape_of(x), dtype);
  p.y = rows_of(n, E, dtype);
  norm_forward(p, threads());
  const Attention attention{wq, bq, wk, bk, wv, bv, mask, cos, sin, H, scale};
  const Tensor z = linear(attention.of(n, k_cache, v_cache, cache_lens), wo, bo);
  const Tensor h = empty(shape_of(x), dtype);
  NormParams sum;
  sum.M = M, sum.N = E, sum.x = rows_of(z, E, dtype), sum.residual = rows_of(x, E, dtype);
  sum.y = rows_of(h, E, dtype);
  norm_forward(sum, threads());
  return layernorm_ffn(
      h, {w1, w2, b1, b2, norm2_weight, norm2_bias, eps2, act, true, Norm(norm), w_gate, b_gate});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }
