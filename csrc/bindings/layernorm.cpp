// torch.ops.fastattn.{add_layer_norm,bias_act}_{fwd,bwd} on the CPU: checks, allocation, launch.

#include <tuple>

#include "row_args.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr uint32_t kHiddenSite = 1, kOutputSite = 2;

constexpr const char* kNorm = "add_layer_norm";
constexpr const char* kAct = "bias_act";

Norm norm_of(int64_t norm) {
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "fastattn::", kNorm, ": norm must be 0, 1 or 2");
  return Norm(norm);
}
Act act_of(int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act <= 5, "fastattn::", kAct, ": act must be in [0, 5], got ", act);
  return Act(act);
}

void check_same_rows(const char* op, const Tensor& a, const char* a_name, const Tensor& b,
                     const char* b_name) {
  STD_TORCH_CHECK(shape_of(a) == shape_of(b), "fastattn::", op, ": ", a_name, " must have ", b_name,
                  "'s shape ", text(b), ", got ", text(a));
}
void check_same_type(const char* op, const Tensor& a, const char* a_name, const Tensor& b,
                     const char* b_name) {
  check_same_rows(op, a, a_name, b, b_name);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "fastattn::", op, ": ", a_name, " must have ",
                  b_name, "'s dtype");
}

enum Keep : int64_t { kKeepStats = 1, kKeepSum = 2 };

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Opt residual, Opt weight,
                                                              Opt bias, Opt seed, int64_t norm,
                                                              double eps, double dropout_p,
                                                              int64_t columns, int64_t keep) {
  NormParams p;
  p.N = columns;
  const RowView x_rows(kNorm, x, columns, "x");
  p.M = x_rows.M(), p.x = x_rows.rows();
  const DType dtype = p.x.dtype;
  std::optional<RowView> residual_rows;
  DType sum_dtype = dtype;
  if (residual) {
    check_same_rows(kNorm, *residual, "residual", x, "x");
    residual_rows.emplace(kNorm, *residual, columns, "residual");
    p.residual = residual_rows->rows();
    sum_dtype = p.residual.dtype;
  }
  p.norm = norm_of(norm), p.eps = float(eps);
  p.weight = vec(kNorm, weight, columns, "weight");
  p.shift = vec(kNorm, bias, columns, "bias");
  p.dropout = dropout_site(kNorm, dropout_p, seed, kOutputSite);
  // Without a norm the sum is y.
  const bool save = keep & kKeepStats;
  const bool sums = (residual || dropout_p > 0.) && p.norm != Norm::kNone && (keep & kKeepSum);
  Tensor y = empty(shape_of(x), sum_dtype);
  Tensor s = sums ? empty(shape_of(x), sum_dtype) : nothing(sum_dtype);
  Tensor mean = empty({save && p.norm == Norm::kLayer ? p.M : 0}, DType::kF32);
  Tensor rstd = empty({save && p.norm != Norm::kNone ? p.M : 0}, DType::kF32);
  p.y = rows_of(y, columns, sum_dtype), p.s = rows_of(s, columns, sum_dtype);
  p.mean = floats(mean), p.rstd = floats(rstd);
  norm_forward(p, threads());
  return {y, s, mean, rstd};
}

enum NormNeed : int64_t { kDx = 1, kDresidual = 2, kDweight = 4, kDbias = 8 };

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(Opt dy, Opt ds, Tensor s, Tensor mean,
                                                              Tensor rstd, Opt weight, Opt bias,
                                                              Opt seed, int64_t norm,
                                                              double dropout_p, int64_t columns,
                                                              int64_t x_dtype, int64_t need) {
  NormGrads g;
  g.N = columns;
  const RowView s_rows(kNorm, s, columns, "s");
  g.M = s_rows.M(), g.s = s_rows.rows();
  std::optional<RowView> dy_rows, ds_rows;
  if (dy) {
    check_same_rows(kNorm, *dy, "dy", s, "s");
    dy_rows.emplace(kNorm, *dy, columns, "dy");
    g.dy = dy_rows->rows();
  }
  if (ds) {
    check_same_rows(kNorm, *ds, "ds", s, "s");
    ds_rows.emplace(kNorm, *ds, columns, "ds");
    g.dsum = ds_rows->rows();
  }
  g.norm = norm_of(norm);
  if (g.norm != Norm::kNone) {
    g.rstd = statistics(kNorm, rstd, g.M, "rstd");
    if (g.norm == Norm::kLayer) g.mean = statistics(kNorm, mean, g.M, "mean");
  }
  g.weight = vec(kNorm, weight, columns, "weight");
  vec(kNorm, bias, columns, "bias");  // its gradient has its shape
  g.dropout = dropout_site(kNorm, dropout_p, seed, kOutputSite);
  STD_TORCH_CHECK(x_dtype >= 0 && x_dtype <= 2, "fastattn::", kNorm, ": x_dtype must be 0, 1 or 2");
  const DType dtype = DType(x_dtype);
  // One tensor serves both where they are equal.
  const bool apart = dropout_p > 0. || dtype != g.s.dtype;
  const bool want_dx = (need & kDx) && (apart || !(need & kDresidual));
  Tensor dx = want_dx ? empty(shape_of(s), dtype) : nothing(dtype);
  Tensor dres = need & kDresidual ? empty(shape_of(s), g.s.dtype) : nothing(g.s.dtype);
  g.dx = rows_of(dx, columns, dtype), g.ds = rows_of(dres, columns, g.s.dtype);
  Tensor dw = (need & kDweight) && weight ? empty(shape_of(*weight), DType::kF32) : nothing();
  Tensor db = (need & kDbias) && bias ? empty(shape_of(*bias), DType::kF32) : nothing();
  g.dweight = floats(dw), g.dshift = floats(db);
  norm_backward(g, threads());
  if (!dy && g.dweight) torch::stable::zero_(dw);
  if (!dy && g.dshift) torch::stable::zero_(db);
  if (dw.numel()) dw = as_parameter(dw, *weight);
  if (db.numel()) db = as_parameter(db, *bias);
  return {dx, dres, dw, db};
}

Tensor bias_act_fwd(Tensor u, Opt bias, Opt gate, Opt gate_bias, Opt seed, int64_t act,
                    double dropout_p) {
  ActParams p;
  STD_TORCH_CHECK(u.dim() > 0, "fastattn::", kAct, ": x must have a dimension");
  p.N = u.size(-1);
  if (u.numel() == 0) return empty(shape_of(u), row_dtype(kAct, u, "x"));
  const RowView u_rows(kAct, u, p.N, "x");
  p.M = u_rows.M(), p.u = u_rows.rows();
  std::optional<RowView> gate_rows;
  if (gate) {
    check_same_type(kAct, *gate, "gate", u, "x");
    gate_rows.emplace(kAct, *gate, p.N, "gate");
    p.g = gate_rows->rows();
  }
  p.bias = vec(kAct, bias, p.N, "bias"), p.gate_bias = vec(kAct, gate_bias, p.N, "gate_bias");
  p.act = act_of(act), p.dropout = dropout_site(kAct, dropout_p, seed, kHiddenSite);
  Tensor a = empty(shape_of(u), p.u.dtype);
  p.a = rows_of(a, p.N, p.u.dtype);
  act_forward(p, threads());
  return a;
}

enum ActNeed : int64_t { kDu = 1, kDactBias = 2, kDgate = 4, kDgateBias = 8 };

std::tuple<Tensor, Tensor, Tensor, Tensor> bias_act_bwd(Tensor da, Tensor u, Opt bias, Opt gate,
                                                        Opt gate_bias, Opt seed, int64_t act,
                                                        double dropout_p, int64_t need) {
  ActGrads g;
  g.N = u.size(-1);
  check_same_type(kAct, da, "the upstream gradient", u, "x");
  const DType dtype = row_dtype(kAct, u, "x");
  Tensor du = need & kDu ? empty(shape_of(u), dtype) : nothing(dtype);
  Tensor dg = (need & kDgate) && gate ? empty(shape_of(u), dtype) : nothing(dtype);
  Tensor db = (need & kDactBias) && bias ? empty(shape_of(*bias), DType::kF32) : nothing();
  Tensor dgb =
      (need & kDgateBias) && gate_bias ? empty(shape_of(*gate_bias), DType::kF32) : nothing();
  if (u.numel() == 0) {
    if (db.numel()) torch::stable::zero_(db);
    if (dgb.numel()) torch::stable::zero_(dgb);
  } else {
    const RowView u_rows(kAct, u, g.N, "x"), da_rows(kAct, da, g.N, "the upstream gradient");
    std::optional<RowView> gate_rows;
    g.M = u_rows.M(), g.u = u_rows.rows(), g.da = da_rows.rows();
    if (gate) {
      check_same_type(kAct, *gate, "gate", u, "x");
      gate_rows.emplace(kAct, *gate, g.N, "gate");
      g.g = gate_rows->rows();
    }
    g.bias = vec(kAct, bias, g.N, "bias"), g.gate_bias = vec(kAct, gate_bias, g.N, "gate_bias");
    g.act = act_of(act), g.dropout = dropout_site(kAct, dropout_p, seed, kHiddenSite);
    g.du = rows_of(du, g.N, dtype), g.dg = rows_of(dg, g.N, dtype);
    g.dbias = floats(db), g.dgate_bias = floats(dgb);
    act_backward(g, threads());
  }
  if (db.numel()) db = as_parameter(db, *bias);
  if (dgb.numel()) dgb = as_parameter(dgb, *gate_bias);
  return {du, db, dg, dgb};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("bias_act_fwd", TORCH_BOX(&bias_act_fwd));
  m.impl("bias_act_bwd", TORCH_BOX(&bias_act_bwd));
}
