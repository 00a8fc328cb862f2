// torch.ops.fastattn.attention_{fwd,bwd} on the CPU: checks, allocation, launch. Stable ABI only.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "../cpu/attention.h"
#include "../cpu/isa.h"
#include "attention_args.h"
#include "cpu.h"

namespace {

using fastattn::AttentionGrads;
using fastattn::AttentionParams;
using fastattn::Operand;
using fastattn::Weights;
using namespace fastattn::binding;

// Values of a small integer tensor, as int64.
std::vector<int64_t> integers(const Tensor& x, int64_t n, const char* name) {
  FASTATTN_CHECK(x.dim() == 1 && x.size(0) == n, name, " must have shape (", n, ",)");
  std::vector<int64_t> out;
  out.reserve(size_t(n));  // zero strides make a tensor of any length: what does not fit fails now
  const int64_t step = x.stride(0);
  for (int64_t i = 0; i < n; ++i) {
    if (x.scalar_type() == ScalarType::Int)
      out.push_back(static_cast<const int32_t*>(x.const_data_ptr())[i * step]);
    else if (x.scalar_type() == ScalarType::Long)
      out.push_back(static_cast<const int64_t*>(x.const_data_ptr())[i * step]);
    else
      FASTATTN_CHECK(false, name, " must be int32 or int64");
  }
  return out;
}

std::vector<float> floats(const Tensor& x) {
  const Tensor f = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  const float* p = static_cast<const float*>(f.const_data_ptr());
  return std::vector<float>(p, p + f.numel());
}

// Everything the launch needs that is not a view of a tensor.
struct Call {
  AttentionParams p;
  bool packed = false;
  std::vector<int64_t> q_len, k_len, q_start, k_start;
  std::vector<float> alibi, sinks;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Shared& a) {
    packed = a.cu_seqlens_q.has_value();
    set_qkv(p, q, k, v, packed);
    if (packed) {
      set_packed(q, k, a);
    } else {
      if (a.q_lens) p.q_len = lengths(*a.q_lens, p.B, p.Sq, "q_lens", q_len);
      if (a.k_lens) p.k_len = lengths(*a.k_lens, p.B, p.Sk, "k_lens", k_len);
    }
    set_features(p, a);
    if (a.alibi_slopes) {
      alibi = floats(*a.alibi_slopes);
      p.alibi = alibi.data();
    }
    if (a.sinks) {
      sinks = floats(*a.sinks);
      p.sinks = sinks.data();
    }
    if (p.dropout_p > 0.) p.seed = uint64_t(*static_cast<const int64_t*>(a.seed->const_data_ptr()));
  }

  // Strides of lse: (H, Tq) packed, (B, H, Sq) padded.
  void set_lse(const Tensor& lse, const Tensor& lse_lo) {
    p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
    p.lse_lo = static_cast<float*>(const_cast<void*>(lse_lo.const_data_ptr()));
    // Contiguous by construction or by check; a size-1 dimension's stride may be anything.
    const int64_t rows = packed ? lse.size(1) : p.Sq;
    p.lse_s = 1, p.lse_h = rows, p.lse_b = packed ? 0 : p.H * rows;
  }

 private:
  static const int64_t* lengths(const Tensor& x, int64_t n, int64_t limit, const char* name,
                                std::vector<int64_t>& out) {
    out = integers(x, n, name);
    for (const int64_t len : out)
      FASTATTN_CHECK(0 <= len && len <= limit, name, " must be in [0, ", limit, "], got ", len);
    return out.data();
  }

  static int64_t starts(const Tensor& cu, int64_t n, int64_t tokens, const char* name,
                        std::vector<int64_t>& start, std::vector<int64_t>& len) {
    const std::vector<int64_t> at = integers(cu, n + 1, name);
    FASTATTN_CHECK(at[0] == 0, name, " must start with 0, got ", at[0]);
    int64_t longest = 0;
    for (int64_t b = 0; b < n; ++b) {
      const int64_t here = at[size_t(b + 1)] - at[size_t(b)];
      FASTATTN_CHECK(here >= 0, name, " must not decrease, got ", at[size_t(b)], " then ",
                     at[size_t(b + 1)]);
      start.push_back(at[size_t(b)]), len.push_back(here);
      longest = std::max(longest, here);
    }
    FASTATTN_CHECK(at.back() <= tokens, name, " must end within the ", tokens,
                   " tokens given, got ", at.back());
    return longest;
  }

  void set_packed(const Tensor& q, const Tensor& k, const Shared& a) {
    FASTATTN_CHECK(a.cu_seqlens_k, "cu_seqlens_k must come with cu_seqlens_q");
    FASTATTN_CHECK(a.cu_seqlens_q->dim() == 1 && a.cu_seqlens_q->size(0) >= 1,
                   "cu_seqlens_q must have shape (B + 1,)");
    p.B = a.cu_seqlens_q->size(0) - 1;
    FASTATTN_CHECK(a.cu_seqlens_k->dim() == 1 && a.cu_seqlens_k->size(0) == p.B + 1,
                   "cu_seqlens_k must have shape (", p.B + 1, ",)");
    p.Sq = starts(*a.cu_seqlens_q, p.B, q.size(0), "cu_seqlens_q", q_start, q_len);
    p.Sk = starts(*a.cu_seqlens_k, p.B, k.size(0), "cu_seqlens_k", k_start, k_len);
    if (a.weights || a.mask || a.bias) {
      FASTATTN_CHECK(a.max_seqlen_q >= p.Sq && a.max_seqlen_k >= p.Sk,
                     "max_seqlen_q and max_seqlen_k must be at least the longest sequences ", p.Sq,
                     " and ", p.Sk, ", got ", a.max_seqlen_q, " and ", a.max_seqlen_k);
      // Work is shared out by them.
      set_length(p.Sq, a.max_seqlen_q, "max_seqlen_q");
      set_length(p.Sk, a.max_seqlen_k, "max_seqlen_k");
    }
    p.q_len = q_len.data(), p.k_len = k_len.data();
    p.q_start = q_start.data(), p.k_start = k_start.data();
  }
};

Tensor empty(const Shape& shape, int32_t dtype) {
  return fastattn::binding::empty(empty_strided, shape, dtype);
}

Tensor empty_as(const Tensor& x, int64_t width) {
  return fastattn::binding::empty_as(empty_strided, x, width);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    Tensor q, Tensor k, Tensor v, Opt mask, Opt bias, Opt q_lens, Opt k_lens, Opt cu_seqlens_q,
    Opt cu_seqlens_k, Opt alibi_slopes, Opt sinks, Opt seed, double scale, int64_t causal,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p, int64_t weights,
    int64_t max_seqlen_q, int64_t max_seqlen_k) {
  Call call(
      q, k, v,
      {mask, bias, q_lens, k_lens, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, scale,
       causal, window_left, window_right, softcap, dropout_p, weights, max_seqlen_q, max_seqlen_k});
  AttentionParams& p = call.p;
  Tensor o = empty_as(q, p.Dv);
  const Shape lse_shape = call.packed ? Shape{p.H, q.size(0)} : Shape{p.B, p.H, p.Sq};
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor lse = empty(lse_shape, f32), lse_lo = empty(lse_shape, f32);
  Tensor w = empty(weights_shape(p), code_of(p.dtype));
  if (call.packed) {  // tokens of no sequence
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -INFINITY);
    torch::stable::zero_(lse_lo);
  }
  p.o = operand(o, call.packed);
  call.set_lse(lse, lse_lo);
  set_weights(p, w);
  fastattn::attention_forward(p, threads());
  return {o, lse, lse_lo, w};
}

enum Need : int64_t { kDq = 1, kDk = 2, kDv = 4, kDbias = 8, kDsinks = 16 };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Opt d_o, Opt dlse, Opt dweights, Tensor q, Tensor k, Tensor v, Opt o, Tensor lse, Tensor lse_lo,
    Opt mask, Opt bias, Opt q_lens, Opt k_lens, Opt cu_seqlens_q, Opt cu_seqlens_k,
    Opt alibi_slopes, Opt sinks, Opt seed, double scale, int64_t causal, int64_t window_left,
    int64_t window_right, double softcap, double dropout_p, int64_t weights, int64_t max_seqlen_q,
    int64_t max_seqlen_k, int64_t need) {
  Call call(
      q, k, v,
      {mask, bias, q_lens, k_lens, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, scale,
       causal, window_left, window_right, softcap, dropout_p, weights, max_seqlen_q, max_seqlen_k});
  AttentionParams& p = call.p;
  const int64_t rows = (call.packed ? q.size(0) : p.B * p.Sq) * p.H;
  for (const Tensor* x : {&lse, &lse_lo}) {
    const bool shape = call.packed ? x->dim() == 2 && x->size(0) == p.H && x->size(1) == q.size(0)
                                   : x->dim() == 3 && x->size(0) == p.B && x->size(1) == p.H &&
                                         x->size(2) == q.size(2);
    FASTATTN_CHECK(shape && x->is_contiguous() && x->scalar_type() == ScalarType::Float,
                   "lse and lse_lo must be the forward's");
  }
  call.set_lse(lse, lse_lo);
  AttentionGrads g;
  const auto check_rows = [&](const Tensor& x, const char* name) {
    FASTATTN_CHECK(x.dim() == q.dim() && x.size(0) == q.size(0) && x.size(1) == q.size(1) &&
                       x.size(-1) == p.Dv && x.scalar_type() == q.scalar_type() &&
                       (call.packed || x.size(2) == p.Sq),
                   name, " must have the shape and dtype of the forward's output");
  };
  if (d_o) {
    check_rows(*d_o, "do");
    g.d_o = operand(*d_o, call.packed);
    if (need & ~kDv) {
      FASTATTN_CHECK(o.has_value(), "o must be given with do");
      check_rows(*o, "o");
      p.o = operand(*o, call.packed);
    }
  }
  std::optional<Tensor> dlse_c;
  if (dlse) {
    FASTATTN_CHECK(dlse->numel() == rows && dlse->scalar_type() == ScalarType::Float,
                   "dlse must have lse's shape");
    dlse_c = torch::stable::contiguous(*dlse);
    g.dlse = static_cast<const float*>(dlse_c->const_data_ptr());
  }
  if (dweights && weights) {
    const Tensor& w = *dweights;
    FASTATTN_CHECK(w.scalar_type() == q.scalar_type(), "dweights must have q's dtype");
    const bool mean = p.weights_mode == Weights::kMean;
    FASTATTN_CHECK(w.dim() == (mean ? 3 : 4) && w.size(0) == p.B && w.size(-2) == p.Sq &&
                       w.size(-1) == p.Sk && (mean || w.size(1) == p.H),
                   "dweights must have the weights' shape");
    g.dweights = {w.const_data_ptr(),    p.dtype,
                  w.stride(0),           mean ? 0 : w.stride(1),
                  w.stride(w.dim() - 2), w.stride(w.dim() - 1)};
    g.dweights_scale = mean ? 1.f / float(p.H) : 1.f;
  }
  const auto result = [&](const Tensor& like, bool wanted, Operand& to) {
    if (!wanted) return empty({0}, code_of(p.dtype));
    Tensor x = empty_as(like, like.size(-1));
    // Tokens of no sequence; keys that no query head reads.
    if (call.packed || p.H == 0) torch::stable::zero_(x);
    to = operand(x, call.packed);
    return x;
  };
  Tensor dq = result(q, need & kDq, g.dq), dk = result(k, need & kDk, g.dk),
         dv = result(v, need & kDv, g.dv);
  Tensor dbias = empty({0}, code_of(p.dtype)), dsinks = empty({0}, code_of(p.dtype));
  if ((need & kDbias) && bias) {
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < bias->dim(); ++d) shape.push_back(bias->size(d));
    // A full bias that no row skips: zeroing it first would cost as much memory traffic again.
    g.dbias_once = !call.packed && !p.q_len && !p.k_len && !p.mask.ptr &&
                   p.causal == fastattn::Causal::kNone && p.window_left < 0 && p.window_right < 0 &&
                   bias->numel() == p.B * p.H * p.Sq * p.Sk;
    dbias = empty(shape, aoti_torch_dtype_float32());
    if (!g.dbias_once) torch::stable::zero_(dbias);
    int64_t* const strides[4] = {&g.dbias_b, &g.dbias_h, &g.dbias_i, &g.dbias_j};
    for (int64_t d = 0; d < bias->dim(); ++d)
      *strides[4 - bias->dim() + d] = bias->size(d) == 1 ? 0 : dbias.stride(d);
    g.dbias = static_cast<float*>(const_cast<void*>(dbias.const_data_ptr()));
  }
  if ((need & kDsinks) && sinks) {
    dsinks = torch::stable::new_zeros(*sinks, {p.H}, ScalarType::Float);
    g.dsinks = static_cast<float*>(const_cast<void*>(dsinks.const_data_ptr()));
  }
  if (p.H > 0) fastattn::attention_backward(p, g, threads());
  if (g.dbias) dbias = torch::stable::to(dbias, bias->scalar_type());
  if (g.dsinks) dsinks = torch::stable::to(dsinks, sinks->scalar_type());
  return {dq, dk, dv, dbias, dsinks};
}

int64_t cpu_isas_available(int64_t) { return fastattn::isas_available(); }

// Returns the instruction set in use; isa >= 0 chooses one first.
int64_t cpu_isa_force(int64_t isa) {
  if (isa >= 0)
    STD_TORCH_CHECK(fastattn::force_isa(fastattn::Isa(isa)),
                    "fastattn::cpu_isa_force: not available on this machine");
  return int64_t(fastattn::current_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas_available", TORCH_BOX(&cpu_isas_available));
  m.impl("cpu_isa_force", TORCH_BOX(&cpu_isa_force));
}
