// torch.ops.fastattn.encoder_layer on the CPU: a whole transformer encoder layer in inference, one
// op where Python would run nine.
//
//   post-norm:  h = norm1(x + Wo attention(Wq x, Wk x, Wv x)),  y = norm2(h + ffn(h))
//   pre-norm:   h = x + Wo attention(Wq n, Wk n, Wv n), n = norm1(x),  y = h + ffn(norm2(h))
//
// Nothing here computes: projections are aten::linear, the rest are the kernels of attention and of
// the norm pass and the op layernorm_ffn; a few tokens in fp32 take the products of few_tokens.h.
// q, k and v are read where the projections put them, and the attention's rows are written as the
// output projection reads them, so nothing is transposed. What it saves is the framework's time
// between the parts, which at 16 tokens of 384 features is as much as theirs.

#include "../cpu/attention.h"
#include "../cpu/few_tokens.h"
#include "attention_args.h"
#include "layer_parts.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "encoder_layer";

// q, k or v (B, S, H D), or a third of one tensor that holds all, as (B, H, S, D).
Operand heads(const Tensor& x, int64_t S, int64_t D, int64_t part) {
  const int64_t width = x.size(-1);
  const int64_t bytes = int64_t(x.element_size());
  Operand o;
  o.ptr = static_cast<char*>(data(x)) + part * bytes;
  o.b = S * width, o.h = D, o.s = width, o.d = 1;
  return o;
}

struct Projections {
  Tensor wq;
  Opt bq, wk, bk, wv, bv;  // without wk, wv: wq is all three, one under the other
};

// Whether a weight can be read by rows, as the kernels for few tokens do.
bool by_rows(const Tensor& w) { return w.dim() == 2 && (w.size(1) == 1 || w.stride(1) == 1); }

void add_bias(const Tensor& y, Opt bias) {
  if (!bias) return;
  ActParams p;
  p.N = y.size(-1), p.M = y.numel() / p.N, p.u = p.a = rows_of(y, p.N, DType::kF32);
  p.bias = vec(kOp, bias, p.N, "a bias"), p.act = Act::kIdentity;
  act_forward(p, threads());
}

// x W_i^T + b_i of a few tokens.
std::vector<Tensor> projected(const Tensor& x, std::vector<const Tensor*> weights,
                              const std::vector<Opt>& biases) {
  FewTokensParams p;
  p.K = x.size(-1), p.M = x.numel() / p.K, p.x = rows_of(x, p.K, DType::kF32);
  std::vector<Tensor> results;
  std::vector<Product> products;
  for (const Tensor* w : weights) {
    STD_TORCH_CHECK(w->size(1) == p.K, "fastattn::", kOp, ": a projection must have ", p.K,
                    " columns, got ", text(*w));
    results.push_back(empty({x.size(0), x.size(1), w->size(0)}, DType::kF32));
    products.push_back({{data(*w), DType::kF32, w->stride(0)},
                        w->size(0),
                        rows_of(results.back(), w->size(0), DType::kF32)});
  }
  p.products = products.data(), p.count = int(products.size());
  few_tokens_products(p, threads());
  for (size_t i = 0; i < results.size(); ++i) add_bias(results[i], biases[i]);
  return results;
}

Tensor attend(const Tensor& x, const Projections& w, const Opt& mask, int64_t H, double scale,
              bool causal, bool few) {
  const bool packed = !w.wk;
  std::vector<Tensor> qkv;
  if (few && packed) {
    qkv = projected(x, {&w.wq}, {w.bq});
  } else if (few) {
    qkv = projected(x, {&w.wq, &*w.wk, &*w.wv}, {w.bq, w.bk, w.bv});
  } else {
    qkv.push_back(linear(x, w.wq, w.bq));
    if (!packed) qkv.push_back(linear(x, *w.wk, w.bk)), qkv.push_back(linear(x, *w.wv, w.bv));
  }
  const Tensor &q = qkv.front(), &k = qkv[packed ? 0 : 1], &v = qkv.back();
  const int64_t B = x.size(0), S = x.size(1), E = packed ? q.size(-1) / 3 : q.size(-1);
  STD_TORCH_CHECK(H > 0 && E % H == 0 && k.size(-1) == q.size(-1) && v.size(-1) == q.size(-1),
                  "fastattn::", kOp, ": q, k and v must have one width, a multiple of ", H,
                  " heads, got ", q.size(-1), ", ", k.size(-1), " and ", v.size(-1));
  AttentionParams p;
  p.B = B, p.H = p.Hk = H, p.D = p.Dv = E / H, p.Sq = p.Sk = S;
  p.dtype = row_dtype(kOp, x, "x");
  p.q = heads(q, S, p.D, 0);
  p.k = heads(k, S, p.D, packed ? E : 0), p.v = heads(v, S, p.D, packed ? 2 * E : 0);
  Tensor o = empty({B, S, E}, p.dtype);
  p.o = heads(o, S, p.D, 0);
  const Tensor lse = empty({2, B, H, S}, DType::kF32);
  p.lse = floats(lse), p.lse_lo = p.lse ? p.lse + B * H * S : nullptr;
  p.lse_s = 1, p.lse_h = S, p.lse_b = H * S;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "fastattn::", kOp,
                    ": mask must be bool");
    p.mask = broadcast(*mask, {B, H, S, S}, "mask");
  }
  p.scale = float(scale), p.causal = causal ? Causal::kTopLeft : Causal::kNone;
  attention_forward(p, threads());
  return o;
}

// layernorm_ffn of a few tokens, without the op around the kernel.
Tensor few_ffn(const Tensor& h, Ffn f) {
  FfnParams p;
  p.D = p.Dout = h.size(-1), p.M = h.numel() / p.D, p.F = f.w1.size(0);
  STD_TORCH_CHECK(f.w1.size(1) == p.D && f.w2.size(1) == p.F && f.w2.size(0) == p.D,
                  "fastattn::", kOp, ": w1 and w2 must be (F, ", p.D, ") and (", p.D, ", F), got ",
                  text(f.w1), " and ", text(f.w2));
  STD_TORCH_CHECK(f.act >= 0 && f.act <= 5, "fastattn::", kOp, ": act out of range");
  p.w1 = {data(f.w1), DType::kF32, f.w1.stride(0)};
  p.w2 = {data(f.w2), DType::kF32, f.w2.stride(0)};
  p.b1 = vec(kOp, f.b1, p.F, "b1"), p.act = Act(f.act);
  p.before.M = p.after.M = p.M, p.before.N = p.after.N = p.D;
  NormParams& norm = f.pre_norm ? p.before : p.after;
  norm.norm = Norm::kLayer, norm.eps = float(f.eps);
  norm.weight = vec(kOp, f.norm_weight, p.D, "norm2_weight");
  norm.shift = vec(kOp, f.norm_bias, p.D, "norm2_bias");
  const Rows rows = rows_of(h, p.D, DType::kF32);
  Tensor y = empty(shape_of(h), DType::kF32);
  p.before.x = p.after.residual = rows, p.after.y = rows_of(y, p.D, DType::kF32);
  p.after.bias = vec(kOp, f.b2, p.D, "b2");
  ffn_forward(p, threads());
  return y;
}

Tensor encoder_layer(Tensor x, Opt mask, Tensor wq, Opt bq, Opt wk, Opt bk, Opt wv, Opt bv,
                     Tensor wo, Opt bo, Opt norm1_weight, Opt norm1_bias, Tensor w1, Opt b1,
                     Tensor w2, Opt b2, Opt norm2_weight, Opt norm2_bias, int64_t H, double scale,
                     bool causal, double eps1, double eps2, int64_t act, bool pre_norm) {
  STD_TORCH_CHECK(x.dim() == 3, "fastattn::", kOp, ": x must have shape (B, S, E), got ", text(x));
  STD_TORCH_CHECK(wk.has_value() == wv.has_value(), "fastattn::", kOp,
                  ": wk and wv must come together");
  const DType dtype = row_dtype(kOp, x, "x");
  const auto check = [&](const Tensor& w) {
    STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), "fastattn::", kOp,
                    ": weights must have x's dtype");
    STD_TORCH_CHECK(w.dim() == 2 && w.numel() > 0, "fastattn::", kOp,
                    ": weights must have shape (out, in) and elements, got ", text(w));
  };
  check(wq), check(wo), check(w1), check(w2);
  if (wk) check(*wk), check(*wv);
  x = torch::stable::contiguous(x);
  const int64_t E = x.size(2), M = x.size(0) * x.size(1);
  if (M == 0) return empty(shape_of(x), dtype);
  STD_TORCH_CHECK(wo.dim() == 2 && wo.size(0) == E, "fastattn::", kOp, ": wo must have ", E,
                  " rows, got ", text(wo));
  NormParams norm;
  norm.M = M, norm.N = E, norm.x = rows_of(x, E, dtype);
  norm.weight = vec(kOp, norm1_weight, E, "norm1_weight");
  norm.shift = vec(kOp, norm1_bias, E, "norm1_bias");
  norm.norm = Norm::kLayer, norm.eps = float(eps1);
  Tensor inner = x;
  if (pre_norm) {
    inner = empty(shape_of(x), dtype);
    norm.y = rows_of(inner, E, dtype);
    norm_forward(norm, threads());
    norm.norm = Norm::kNone, norm.weight = norm.shift = {};
  }
  bool few = dtype == DType::kF32 && few_tokens_serve(M);
  for (const Tensor* w : {&wq, &wo, &w1, &w2}) few = few && by_rows(*w);
  if (wk) few = few && by_rows(*wk) && by_rows(*wv);
  const Tensor o = attend(inner, {wq, bq, wk, bk, wv, bv}, mask, H, scale, causal, few);
  const Tensor z = few ? projected(o, {&wo}, {std::nullopt})[0] : linear(o, wo, std::nullopt);
  Tensor h = empty(shape_of(x), dtype);
  norm.x = rows_of(z, E, dtype), norm.bias = vec(kOp, bo, E, "bo");
  norm.residual = rows_of(x, E, dtype), norm.y = rows_of(h, E, dtype);
  norm_forward(norm, threads());
  if (few) return few_ffn(h, {w1, w2, b1, b2, norm2_weight, norm2_bias, eps2, act, pre_norm});
  return layernorm_ffn(h, {w1, w2, b1, b2, norm2_weight, norm2_bias, eps2, act, pre_norm});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("encoder_layer", TORCH_BOX(&encoder_layer)); }
