// Cases of csrc/cuda/attention.h. Tensors: q k v o (B, H, S, D) or, with cu_q, (T, H, D); lse,
// lse_lo; attention_weights: weights (B, H, Sq, Sk), or (B, Sq, Sk) for their mean over the heads.
#include "attention_case.h"

namespace fastattn::cuda {

namespace {

AttentionParams params(Case& c) {
  AttentionParams p;
  Tensor &q = c.tensor("q"), &k = c.tensor("k"), &v = c.tensor("v");
  p.cu_q = integers(c, "cu_q");
  p.cu_k = integers(c, "cu_k");
  p.q_lens = integers(c, "q_lens");
  p.k_lens = integers(c, "k_lens");
  const bool packed = p.cu_q.ptr != nullptr;
  p.B = static_cast<int>(packed ? c.tensor("cu_q").sizes[0] - 1 : q.sizes[0]);
  p.H = static_cast<int>(q.sizes[1]);
  p.Hk = static_cast<int>(k.sizes[1]);
  p.D = static_cast<int>(q.sizes.back());
  p.Dv = static_cast<int>(v.sizes.back());
  p.Sq = static_cast<int>(packed ? c.integer("Sq") : q.sizes[2]);
  p.Sk = static_cast<int>(packed ? c.integer("Sk") : k.sizes[2]);
  p.Tq = packed ? q.sizes[0] : 0;
  p.Tk = packed ? k.sizes[0] : 0;
  p.dtype = dtype_of(q);
  p.q = operand(q);
  p.k = operand(k);
  p.v = operand(v);
  p.mask = broadcast(c, "mask");
  p.bias = broadcast(c, "bias");
  if (Tensor* slopes = c.find("alibi")) {
    p.alibi = slopes->data<float>();
    p.alibi_b = slopes->sizes.size() == 2 ? slopes->strides[0] : 0;
  }
  p.sinks = c.data<float>("sinks");
  p.seed = c.data<int64_t>("seed");
  p.scale = static_cast<float>(c.real("scale"));
  p.softcap = static_cast<float>(c.real("softcap"));
  p.causal = static_cast<Causal>(c.integer("causal"));
  p.window_left = static_cast<int>(c.integer("window_left"));
  p.window_right = static_cast<int>(c.integer("window_right"));
  p.dropout_p = c.real("dropout_p");
  return p;
}

}  // namespace

FASTATTN_EMU_LAUNCHER(attention_forward) {
  AttentionParams p = params(c);
  p.o = operand(c.tensor("o"));
  p.lse = c.data<float>("lse");
  p.lse_lo = c.data<float>("lse_lo");
  return attention_forward(p, nullptr).error;
}

FASTATTN_EMU_LAUNCHER(attention_weights) {
  AttentionParams p = params(c);
  p.lse = c.data<float>("lse");
  p.lse_lo = c.data<float>("lse_lo");
  Tensor& w = c.tensor("weights");
  p.weights_mode = w.sizes.size() == 4 ? Weights::kFull : Weights::kMean;
  p.weights = w.sizes.size() == 4 ? operand(w)
                                  : Operand{w.data(), w.strides[0], 0, w.strides[1], w.strides[2]};
  // v is not read: one of a width that only the forward could serve must not matter.
  return attention_weights(p, nullptr).error;
}

#ifdef FASTATTN_EMU_BACKWARD  // programs of the forward alone do not link its kernels
FASTATTN_EMU_LAUNCHER(attention_backward) {
  AttentionParams p = params(c);
  const auto given = [&](const char* name) {
    return c.find(name) ? operand(c.tensor(name)) : Operand{};
  };
  const bool packed = p.cu_q.ptr != nullptr;
  p.o = given("o");
  p.lse = c.data<float>("lse");
  p.lse_lo = c.data<float>("lse_lo");
  AttentionGrads g;
  g.d_o = given("d_o"), g.dq = given("dq"), g.dk = given("dk"), g.dv = given("dv");
  if (Tensor* t = c.find("dlse")) {
    const int64_t* strides = t->strides.data();
    g.dlse = {t->data(), packed ? 0 : strides[0], strides[packed ? 0 : 1], strides[packed ? 1 : 2],
              0};
  }
  if (Tensor* t = c.find("dweights")) {
    const bool full = t->sizes.size() == 4;
    p.weights_mode = full ? Weights::kFull : Weights::kMean;
    g.dweights =
        full ? operand(*t) : Operand{t->data(), t->strides[0], 0, t->strides[1], t->strides[2]};
    g.dweights_scale = full ? 1.f : 1.f / static_cast<float>(p.H);
  }
  if (Tensor* t = c.find("dbias")) {
    const auto stride = [&](size_t d) { return t->sizes[d] == 1 ? 0 : t->strides[d]; };
    g.dbias_mode = static_cast<BiasGrad>(c.integer("dbias_mode"));
    g.dbias = t->data(), g.dbias_dtype = dtype_of(*t);
    g.dbias_b = stride(0), g.dbias_h = stride(1), g.dbias_i = stride(2), g.dbias_j = stride(3);
    g.bias_b = static_cast<int>(t->sizes[0]), g.bias_h = static_cast<int>(t->sizes[1]);
  }
  g.dsinks = c.data<float>("dsinks");
  g.delta = c.data<float>("delta"), g.lse_units = c.data<float>("lse_units");
  g.dq_sums = c.data<float>("dq_sums");
  return attention_backward(p, g, nullptr).error;
}
#endif

}  // namespace fastattn::cuda
