// Cases of csrc/cuda/layernorm_ffn.h. Tensors: x (M, D), w1, w_gate (F, D), w2 (Dout, F), vectors by
// their names; y, s, mean, rstd. The backward's scratch is the launcher's own.
#include "../../../../csrc/cuda/layernorm_ffn.h"

#include <memory>

#include "../case.h"

namespace fastattn::cuda {

namespace {

using emu::Case;
using emu::Tensor;

DType dtype_of(const Tensor& t) {
  return t.dtype == "bf16" ? DType::kBf16 : t.dtype == "f16" ? DType::kF16 : DType::kF32;
}

Matrix matrix(Case& c, const char* name) {
  Tensor* t = c.find(name);
  if (!t) return {};
  return {t->data(), dtype_of(*t), t->strides[0]};
}

Parameter parameter(Case& c, const char* name) {
  Tensor* t = c.find(name);
  if (!t) return {};
  return {t->data(), dtype_of(*t)};
}

LayerNormFfnParams params(Case& c) {
  LayerNormFfnParams p;
  Tensor &x = c.tensor("x"), &w1 = c.tensor("w1"), &w2 = c.tensor("w2");
  p.M = x.sizes[0], p.D = static_cast<int>(x.sizes[1]);
  p.F = static_cast<int>(w1.sizes[0]), p.Dout = static_cast<int>(w2.sizes[0]);
  p.dtype = dtype_of(w1);
  p.x = matrix(c, "x"), p.w1 = matrix(c, "w1"), p.w2 = matrix(c, "w2");
  p.w_gate = matrix(c, "w_gate");
  p.b1 = parameter(c, "b1"), p.b2 = parameter(c, "b2"), p.b_gate = parameter(c, "b_gate");
  p.norm_weight = parameter(c, "norm_weight"), p.shift = parameter(c, "norm_bias");
  p.norm = static_cast<Norm>(c.integer("norm")), p.act = static_cast<Act>(c.integer("act"));
  p.eps = static_cast<float>(c.real("eps"));
  p.pre_norm = c.integer("pre_norm"), p.residual = c.integer("residual");
  p.dropout_p = c.real("dropout_p"), p.hidden_dropout_p = c.real("hidden_dropout_p");
  p.seed = c.data<int64_t>("seed");
  p.s = matrix(c, "s"), p.mean = c.data<float>("mean"), p.rstd = c.data<float>("rstd");
  return p;
}

// Scratch of exactly that many elements, full of NaN.
class Scratch {
 public:
  Scratch(int64_t n, size_t size) : data_(new unsigned char[static_cast<size_t>(n) * size]) {
    for (size_t i = 0; i < static_cast<size_t>(n) * size; ++i) data_[i] = 0xff;
  }
  void* get() { return data_.get(); }
  float* floats() { return static_cast<float*>(get()); }

 private:
  std::unique_ptr<unsigned char[]> data_;
};

}  // namespace

FASTATTN_EMU_LAUNCHER(layernorm_ffn_forward) {
  LayerNormFfnParams p = params(c);
  p.y = matrix(c, "y");
  p.splits = static_cast<int>(c.integer("splits"));
  Scratch partials(p.splits * p.M * layernorm_ffn_stride(p.Dout), sizeof(float));
  p.partials = partials.floats();
  return layernorm_ffn_forward(p, nullptr).error;
}

#ifdef FASTATTN_EMU_BACKWARD  // programs of the forward alone do not link its kernels
FASTATTN_EMU_LAUNCHER(layernorm_ffn_backward) {
  LayerNormFfnParams p = params(c);
  LayerNormFfnGrads g;
  g.dy = matrix(c, "dy"), g.dx = matrix(c, "dx");
  g.dw1 = c.data("dw1"), g.dw2 = c.data("dw2"), g.dw_gate = c.data("dw_gate");
  g.db1 = c.data<float>("db1"), g.db2 = c.data<float>("db2");
  g.db_gate = c.data<float>("db_gate");
  g.dnorm_weight = c.data<float>("dnorm_weight"), g.dshift = c.data<float>("dnorm_bias");
  g.chunks = static_cast<int>(c.integer("chunks"));
  const LayerNormFfnScratch size = layernorm_ffn_scratch(p, g);
  const size_t element = p.dtype == DType::kF32 ? 4 : 2;
  Scratch xn(size.xn, element), dz(size.dz, element);
  Scratch rows(size.row_sums, sizeof(float)), weights(size.weight_sums, sizeof(float));
  g.xn = xn.get(), g.dz = dz.get();
  g.row_sums = rows.floats(), g.weight_sums = weights.floats();
  return layernorm_ffn_backward(p, g, nullptr).error;
}
#endif

}  // namespace fastattn::cuda
