// torch.ops.fastattn.layernorm_ffn_{fwd,bwd} on the CPU: checks, allocation, launch.
//
// Which GEMM: the fused kernels of csrc/cpu where they beat the library's (few rows; bf16 on AMX
// tiles), else aten::mm with the norm pass before, the act pass between and the norm pass behind.
// In inference the library's GEMM runs over kRows rows at a time, so that the hidden layer is a
// scratch of kRows rows, warm in the caches, and never exists as a whole.
//
// The backward is five GEMMs of the library (gated eight) with the passes between them: dW sums
// over all rows, so nothing is cut there.

#include <array>
#include <tuple>

#include "products.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "layernorm_ffn";
constexpr uint32_t kHiddenSite = 1, kOutputSite = 2;
constexpr int64_t kRows = 512;

enum Save : int64_t { kSaveStats = 1, kSaveU = 2, kSaveA = 4 };

Tensor rows_from(const Tensor& x, int64_t m, int64_t n, int64_t N) {
  return view2(x, n, N, N, 1, m * N);
}

struct Numbers {
  int64_t norm;
  double eps;
  int64_t act;
  bool pre_norm, residual;
  double dropout_p, hidden_dropout_p;
};

// The arguments that both directions share, checked; and the passes that they make.
struct Call {
  Tensor x, w1, w2;
  Opt b1, b2, w_gate, b_gate, norm_weight, norm_bias;
  Numbers n;
  DType x_dtype, dtype;  // of x and y; of the weights and the hidden layer
  int64_t M = 0, D = 0, F = 0, Dout = 0;
  bool by_columns = false;  // a weight is: no kernel of ours
  std::optional<RowView> x_rows;
  Rows w1_rows, w2_rows, w_gate_rows;
  Vec b1_v, b2_v, b_gate_v, norm_weight_v, norm_bias_v;
  Norm norm, pre, post;
  Act act;
  DropoutSite hidden, output;

  Call(Tensor x_, Tensor w1_, Opt b1_, Tensor w2_, Opt b2_, Opt w_gate_, Opt b_gate_,
       Opt norm_weight_, Opt norm_bias_, const Opt& seed, Numbers numbers)
      : x(x_),
        w1(w1_),
        w2(w2_),
        b1(b1_),
        b2(b2_),
        w_gate(w_gate_),
        b_gate(b_gate_),
        norm_weight(norm_weight_),
        norm_bias(norm_bias_),
        n(numbers) {
    check_weight(w1, "w1"), check_weight(w2, "w2");
    F = w1.size(0), D = w1.size(1), Dout = w2.size(0);
    STD_TORCH_CHECK(w2.size(1) == F, "fastattn::", kOp, ": w2 must have ", F,
                    " columns to match w1 ", text(w1), ", got ", text(w2));
    STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) == D, "fastattn::", kOp, ": x must have ", D,
                    " columns to match w1 ", text(w1), ", got ", text(x));
    STD_TORCH_CHECK(!n.residual || Dout == D, "fastattn::", kOp, ": the residual needs w2 with ", D,
                    " rows to match x ", text(x), ", got ", text(w2));
    STD_TORCH_CHECK(w1.scalar_type() == w2.scalar_type(), "fastattn::", kOp,
                    ": w1 and w2 must have one dtype");
    x_dtype = row_dtype(kOp, x, "x"), dtype = row_dtype(kOp, w1, "w1");
    STD_TORCH_CHECK(x_dtype == dtype || x_dtype == DType::kF32, "fastattn::", kOp,
                    ": x must be float32 or have w1's dtype");
    w1_rows = weight(w1), w2_rows = weight(w2);
    if (w_gate) {
      check_weight(*w_gate, "w_gate");
      STD_TORCH_CHECK(
          shape_of(*w_gate) == shape_of(w1) && w_gate->scalar_type() == w1.scalar_type(),
          "fastattn::", kOp, ": w_gate must have w1's shape ", text(w1), " and dtype, got ",
          text(*w_gate));
      w_gate_rows = weight(*w_gate);
    }
    STD_TORCH_CHECK(n.norm >= 0 && n.norm <= 2 && n.act >= 0 && n.act <= 5, "fastattn::", kOp,
                    ": norm or act out of range");
    norm = Norm(n.norm), act = Act(n.act);
    pre = n.pre_norm ? norm : Norm::kNone, post = n.pre_norm ? Norm::kNone : norm;
    const int64_t normed = n.pre_norm ? D : Dout;
    norm_weight_v = vec(kOp, norm_weight, normed, "norm_weight");
    norm_bias_v = vec(kOp, norm_bias, normed, "norm_bias");
    b1_v = vec(kOp, b1, F, "b1"), b2_v = vec(kOp, b2, Dout, "b2");
    b_gate_v = vec(kOp, b_gate, F, "b_gate");
    hidden = dropout_site(kOp, n.hidden_dropout_p, seed, kHiddenSite);
    output = dropout_site(kOp, n.dropout_p, seed, kOutputSite);
    STD_TORCH_CHECK(D > 0 && F > 0 && Dout > 0, "fastattn::", kOp, ": weights must not be empty");
    x_rows.emplace(kOp, x, D, "x");
    M = x_rows->M();
  }

  Shape out_shape() const {
    Shape s = shape_of(x);
    s.back() = Dout;
    return s;
  }

  // norm(x), where pre is a norm: rows [m, m + rows) of it into y.
  NormParams before(int64_t m, int64_t rows) const {
    NormParams p;
    p.M = rows, p.N = D, p.x = part(x_rows->rows(), m), p.norm = pre, p.eps = float(n.eps);
    if (pre != Norm::kNone) p.weight = norm_weight_v, p.shift = norm_bias_v;
    return p;
  }
  // y = post(residual + dropout(z + b2)); the caller sets x, s, y, mean and rstd.
  NormParams after(int64_t m, int64_t rows) const {
    NormParams p;
    p.M = rows, p.N = Dout, p.bias = b2_v, p.dropout = output, p.dropout.first_row = m;
    if (n.residual) p.residual = part(x_rows->rows(), m);
    p.norm = post, p.eps = float(n.eps);
    if (post != Norm::kNone) p.weight = norm_weight_v, p.shift = norm_bias_v;
    return p;
  }
  // The input of the first GEMM as a matrix, where it is x as it lies.
  std::optional<Tensor> plain_x() const {
    if (pre != Norm::kNone || x_dtype != dtype) return std::nullopt;
    const Tensor& t = x_rows->tensor();
    return view2(t, M, D, x_rows->rows().stride, 1);
  }
  static Rows part(Rows x, int64_t m) {
    x.ptr = static_cast<char*>(x.ptr) + m * x.stride * (x.dtype == DType::kF32 ? 4 : 2);
    return x;
  }

 private:
  static void check_weight(const Tensor& w, const char* name) {
    STD_TORCH_CHECK(w.dim() == 2, "fastattn::", kOp, ": ", name, " must have shape (out, in), got ",
                    text(w));
  }
  // Kernels read rows of unit stride. The library's GEMM also takes a weight stored by columns (the
  // transposed view of a GPT-2 Conv1D) as it lies; any other layout is copied.
  Rows weight(Tensor& w) {
    if (w.size(1) != 1 && w.stride(1) != 1) {
      if (w.stride(0) == 1 && w.stride(1) >= w.size(0)) {
        by_columns = true;
        return {};
      }
      w = torch::stable::contiguous(w);
    }
    return {data(w), row_dtype(kOp, w, "a weight"), w.stride(0)};
  }
};

// What the forward returns beside y.
struct Saved {
  Tensor s, mean, rstd, u, g, a;
};

void set_stats(NormParams& p, const Saved& saved, int64_t m) {
  if (saved.mean.numel()) p.mean = floats(saved.mean) + m;
  if (saved.rstd.numel()) p.rstd = floats(saved.rstd) + m;
}

void by_kernel(const Call& c, FfnParams& p, const Saved& saved, const Tensor& y) {
  p.before = c.before(0, c.M), p.after = c.after(0, c.M);
  set_stats(c.n.pre_norm ? p.before : p.after, saved, 0);
  p.after.y = rows_of(y, c.Dout, c.x_dtype);
  p.after.s = rows_of(saved.s, c.Dout, c.x_dtype);
  ffn_forward(p, threads());
}

void by_library(const Call& c, const Saved& saved, const Tensor& y) {
  const Parallel parallel = threads();
  // Where the hidden layer is kept as a whole, cutting it only costs: the library packs the weights
  // for every product.
  const bool whole = saved.u.numel() || saved.a.numel();
  const int64_t step = whole ? c.M : std::min(c.M, kRows);
  const std::optional<Tensor> plain = c.plain_x();
  const auto scratch = [&](const Tensor& kept, int64_t N) {
    return kept.numel() ? nothing() : empty({step, N}, c.dtype);
  };
  Tensor xn = plain ? nothing() : empty({step, c.D}, c.dtype);
  Tensor u_part = scratch(saved.u, c.F), a_part = scratch(saved.a, c.F);
  Tensor g_part = c.w_gate ? scratch(saved.g, c.F) : nothing();
  Tensor z_part = empty({step, c.Dout}, c.dtype);
  const Tensor w1t = transposed(c.w1), w2t = transposed(c.w2);
  for (int64_t m = 0; m < c.M; m += step) {
    const int64_t rows = std::min(step, c.M - m);
    const auto here = [&](const Tensor& kept, const Tensor& part, int64_t N) {
      return kept.numel() ? rows_from(kept, m, rows, N) : rows_from(part, 0, rows, N);
    };
    Tensor in = xn;
    if (plain) {
      in = view2(*plain, rows, c.D, plain->stride(0), 1, m * plain->stride(0));
    } else {
      NormParams p = c.before(m, rows);
      if (c.n.pre_norm) set_stats(p, saved, m);
      p.y = rows_of(xn, c.D, c.dtype);
      norm_forward(p, parallel);
      in = rows_from(xn, 0, rows, c.D);
    }
    const Tensor u = here(saved.u, u_part, c.F), a = here(saved.a, a_part, c.F);
    product(in, w1t, u);
    ActParams act;
    act.M = rows, act.N = c.F, act.u = rows_of(u, c.F, c.dtype);
    if (c.w_gate) {
      const Tensor g = here(saved.g, g_part, c.F);
      product(in, transposed(*c.w_gate), g);
      act.g = rows_of(g, c.F, c.dtype);
    }
    act.bias = c.b1_v, act.gate_bias = c.b_gate_v, act.act = c.act;
    act.dropout = c.hidden, act.dropout.first_row = m;
    act.a = rows_of(a, c.F, c.dtype);
    act_forward(act, parallel);
    const Tensor z = rows_from(z_part, 0, rows, c.Dout);
    product(a, w2t, z);
    NormParams p = c.after(m, rows);
    if (!c.n.pre_norm) set_stats(p, saved, m);
    p.x = rows_of(z, c.Dout, c.dtype);
    p.y = Call::part(rows_of(y, c.Dout, c.x_dtype), m);
    if (saved.s.numel()) p.s = Call::part(rows_of(saved.s, c.Dout, c.x_dtype), m);
    norm_forward(p, parallel);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_ffn_fwd(
    Tensor x, Tensor w1, Opt b1, Tensor w2, Opt b2, Opt w_gate, Opt b_gate, Opt norm_weight,
    Opt norm_bias, Opt seed, int64_t norm, double eps, int64_t act, bool pre_norm, bool residual,
    double dropout_p, double hidden_dropout_p, int64_t save) {
  const Call c(x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed,
               {norm, eps, act, pre_norm, residual, dropout_p, hidden_dropout_p});
  const bool stats = save & kSaveStats, post = c.post != Norm::kNone;
  const auto kept = [&](bool wanted, int64_t N, DType dtype) {
    return wanted ? empty({c.M, N}, dtype) : nothing(dtype);
  };
  Tensor y = empty(c.out_shape(), c.x_dtype);
  Saved saved{stats && post ? empty(c.out_shape(), c.x_dtype) : nothing(c.x_dtype),
              empty({stats && c.norm == Norm::kLayer ? c.M : 0}, DType::kF32),
              empty({stats && c.norm != Norm::kNone ? c.M : 0}, DType::kF32),
              kept(save & kSaveU, c.F, c.dtype),
              kept((save & kSaveU) && c.w_gate, c.F, c.dtype),
              kept(save & kSaveA, c.F, c.dtype)};
  if (c.M > 0) {
    FfnParams p;
    p.M = c.M, p.D = c.D, p.F = c.F, p.Dout = c.Dout;
    p.w1 = c.w1_rows, p.w2 = c.w2_rows, p.w_gate = c.w_gate_rows;
    p.b1 = c.b1_v, p.b_gate = c.b_gate_v, p.act = c.act, p.dropout = c.hidden;
    p.u = rows_of(saved.u, c.F, c.dtype), p.g = rows_of(saved.g, c.F, c.dtype);
    p.a = rows_of(saved.a, c.F, c.dtype);
    if (!c.by_columns && ffn_serves(p, threads().threads))
      by_kernel(c, p, saved, y);
    else
      by_library(c, saved, y);
  }
  return {y, saved.s, saved.mean, saved.rstd, saved.u, saved.g, saved.a};
}

enum Need : int64_t {
  kDx = 1,
  kDw1 = 2,
  kDb1 = 4,
  kDw2 = 8,
  kDb2 = 16,
  kDwGate = 32,
  kDbGate = 64,
  kDnormWeight = 128,
  kDnormBias = 256
};

// The gradients, each empty where it is not wanted.
struct Grads {
  Tensor dx, dw1, db1, dw2, db2, dw_gate, db_gate, dnorm_weight, dnorm_bias;
};

class Backward {
 public:
  Backward(const Call& call, const Tensor& dy, const Saved& saved, int64_t need)
      : c(call), dy_(kOp, dy, call.Dout, "dy"), saved_(saved), need_(need), parallel_(threads()) {
    // Beyond the second GEMM: du and what it leads to.
    through_act_ = need & (kDx | kDw1 | kDb1 | kDwGate | kDbGate | (c.n.pre_norm ? kNormNeed : 0));
    to_x_ = need & (kDx | (c.n.pre_norm ? kNormNeed : 0));
  }

  Grads run() {
    for (Tensor* x : {&r.dx, &r.dw1, &r.db1, &r.dw2, &r.db2, &r.dw_gate, &r.db_gate,
                      &r.dnorm_weight, &r.dnorm_bias})
      *x = nothing();
    input();
    hidden_again();
    behind();
    if (through_act_) {
      act();
      weights_of_first();
      if (to_x_) front();
    } else if (need_ & kDw2) {
      if (!a_.numel()) a_ = activation_again();
    }
    if (need_ & kDw2) r.dw2 = weight_grad(dz_, a_, c.Dout, c.F);
    return finish();
  }

 private:
  static constexpr int64_t kNormNeed = kDnormWeight | kDnormBias;

  float* sum(Tensor& to, bool wanted, int64_t n) {
    if (!wanted) return nullptr;
    to = empty({n}, DType::kF32);
    return floats(to);
  }

  bool wants_u() const { return through_act_ || ((need_ & kDw2) && !saved_.a.numel()); }

  // norm(x), where a product needs it again.
  void input() {
    const std::optional<Tensor> plain = c.plain_x();
    if (plain) {
      xn_ = *plain;
    } else if ((wants_u() && !saved_.u.numel()) || (need_ & (kDw1 | kDwGate))) {
      xn_ = empty({c.M, c.D}, c.dtype);
      NormParams p = c.before(0, c.M);
      p.y = rows_of(xn_, c.D, c.dtype);
      norm_forward(p, parallel_);
    }
  }

  // recompute="all": the pre-activations.
  void hidden_again() {
    u_ = saved_.u, g_ = saved_.g, a_ = saved_.a;
    if (u_.numel() || !wants_u()) return;
    u_ = empty({c.M, c.F}, c.dtype);
    product(xn_, transposed(c.w1), u_);
    if (!c.w_gate) return;
    g_ = empty({c.M, c.F}, c.dtype);
    product(xn_, transposed(*c.w_gate), g_);
  }

  // From dy to dz, the gradient of the second GEMM's result, and ds, that of the residual sum.
  void behind() {
    const bool post = c.post != Norm::kNone, drops = c.n.dropout_p > 0.;
    const bool cast = c.x_dtype != c.dtype;
    NormGrads g;
    g.M = c.M, g.N = c.Dout, g.dy = dy_.rows(), g.norm = c.post, g.dropout = c.output;
    g.dbias = sum(r.db2, (need_ & kDb2) && c.b2, c.Dout);
    const bool residual = c.n.residual && (need_ & kDx);
    if (post) {
      g.s = rows_of(saved_.s, c.Dout, c.x_dtype);
      g.mean = floats(saved_.mean), g.rstd = floats(saved_.rstd), g.weight = c.norm_weight_v;
      g.dweight = sum(r.dnorm_weight, (need_ & kDnormWeight) && c.norm_weight, c.Dout);
      g.dshift = sum(r.dnorm_bias, (need_ & kDnormBias) && c.norm_bias, c.Dout);
    }
    if (post && residual) {
      ds_ = empty({c.M, c.Dout}, c.x_dtype);
      g.ds = rows_of(ds_, c.Dout, c.x_dtype);
    }
    const bool needed = through_act_ || (need_ & kDw2);
    if (needed && !post && !drops && !cast) {
      const Tensor& t = dy_.tensor();
      dz_ = view2(t, c.M, c.Dout, dy_.rows().stride, 1);
    } else if (needed) {
      dz_ = empty({c.M, c.Dout}, c.dtype);
      g.dx = rows_of(dz_, c.Dout, c.dtype);
    }
    if (g.ds.ptr || g.dx.ptr || g.dbias || g.dweight || g.dshift) norm_backward(g, parallel_);
  }

  // du (and dg) from da = dz W2; a again where it is not saved.
  void act() {
    da_ = empty({c.M, c.F}, c.dtype);
    product(dz_, c.w2, da_);
    ActGrads g;
    g.M = c.M, g.N = c.F, g.u = rows_of(u_, c.F, c.dtype), g.g = rows_of(g_, c.F, c.dtype);
    g.da = rows_of(da_, c.F, c.dtype);
    g.bias = c.b1_v, g.gate_bias = c.b_gate_v, g.act = c.act, g.dropout = c.hidden;
    g.du = g.da;  // in place
    if (c.w_gate) {
      dg_ = empty({c.M, c.F}, c.dtype);
      g.dg = rows_of(dg_, c.F, c.dtype);
    }
    if ((need_ & kDw2) && !a_.numel()) {
      a_ = empty({c.M, c.F}, c.dtype);
      g.a = rows_of(a_, c.F, c.dtype);
    }
    g.dbias = sum(r.db1, (need_ & kDb1) && c.b1, c.F);
    g.dgate_bias = sum(r.db_gate, (need_ & kDbGate) && c.b_gate, c.F);
    act_backward(g, parallel_);
  }

  Tensor activation_again() {
    Tensor a = empty({c.M, c.F}, c.dtype);
    ActParams p;
    p.M = c.M, p.N = c.F, p.u = rows_of(u_, c.F, c.dtype), p.g = rows_of(g_, c.F, c.dtype);
    p.bias = c.b1_v, p.gate_bias = c.b_gate_v, p.act = c.act, p.dropout = c.hidden;
    p.a = rows_of(a, c.F, c.dtype);
    act_forward(p, parallel_);
    return a;
  }

  // (out, in) = d^T in, in the weights' dtype.
  Tensor weight_grad(const Tensor& d, const Tensor& in, int64_t out, int64_t columns) {
    Tensor dw = empty({out, columns}, c.dtype);
    return product(transposed(d), in, dw);
  }
  void weights_of_first() {
    if (need_ & kDw1) r.dw1 = weight_grad(da_, xn_, c.F, c.D);
    if ((need_ & kDwGate) && c.w_gate) r.dw_gate = weight_grad(dg_, xn_, c.F, c.D);
  }

  // From du to dx, and the parameters of a norm in front.
  void front() {
    Tensor dxn = empty({c.M, c.D}, c.dtype);
    product(da_, c.w1, dxn);
    if (c.w_gate) {
      Tensor more = empty({c.M, c.D}, c.dtype);
      product(dg_, *c.w_gate, more);
      NormParams add;
      add.M = c.M, add.N = c.D, add.x = rows_of(dxn, c.D, c.dtype);
      add.residual = rows_of(more, c.D, c.dtype), add.y = add.x;
      norm_forward(add, parallel_);
    }
    NormGrads g;
    g.M = c.M, g.N = c.D, g.dy = rows_of(dxn, c.D, c.dtype), g.norm = c.pre;
    g.s = c.x_rows->rows(), g.mean = floats(saved_.mean), g.rstd = floats(saved_.rstd);
    if (c.pre != Norm::kNone) {
      g.weight = c.norm_weight_v;
      g.dweight = sum(r.dnorm_weight, (need_ & kDnormWeight) && c.norm_weight, c.D);
      g.dshift = sum(r.dnorm_bias, (need_ & kDnormBias) && c.norm_bias, c.D);
    }
    if (need_ & kDx) {
      if (c.n.residual)
        g.dsum = c.post == Norm::kNone ? dy_.rows() : rows_of(ds_, c.Dout, c.x_dtype);
      r.dx = empty(shape_of(c.x), c.x_dtype);
      g.dx = rows_of(r.dx, c.D, c.x_dtype);
    }
    norm_backward(g, parallel_);
  }

  Grads finish() {
    const auto cast = [](Tensor& sum, const Opt& parameter) {
      if (!sum.numel() || !parameter) return;
      sum = as_parameter(torch::stable::view(sum, shape_of(*parameter)), *parameter);
    };
    cast(r.db1, c.b1), cast(r.db2, c.b2), cast(r.db_gate, c.b_gate);
    cast(r.dnorm_weight, c.norm_weight), cast(r.dnorm_bias, c.norm_bias);
    return r;
  }

  const Call& c;
  const RowView dy_;
  const Saved& saved_;
  const int64_t need_;
  const Parallel parallel_;
  bool through_act_ = false, to_x_ = false;
  Tensor xn_, u_, g_, a_, dz_, ds_, da_, dg_;
  Grads r;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
layernorm_ffn_bwd(Tensor dy, Tensor x, Tensor w1, Opt b1, Tensor w2, Opt b2, Opt w_gate, Opt b_gate,
                  Opt norm_weight, Opt norm_bias, Opt seed, Tensor s, Tensor mean, Tensor rstd,
                  Tensor u, Tensor g, Tensor a, int64_t norm, double eps, int64_t act,
                  bool pre_norm, bool residual, double dropout_p, double hidden_dropout_p,
                  int64_t need) {
  const Call c(x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed,
               {norm, eps, act, pre_norm, residual, dropout_p, hidden_dropout_p});
  STD_TORCH_CHECK(shape_of(dy) == c.out_shape() && dy.scalar_type() == x.scalar_type(),
                  "fastattn::", kOp, ": dy must have the output's shape and dtype, got ", text(dy));
  const auto check = [&](const Tensor& t, int64_t numel, DType dtype, const char* name) {
    STD_TORCH_CHECK(t.numel() == 0 || (t.numel() == numel && t.is_contiguous() &&
                                       row_dtype(kOp, t, name) == dtype),
                    "fastattn::", kOp, ": ", name, " must be the forward's");
  };
  check(u, c.M * c.F, c.dtype, "u"), check(g, c.M * c.F, c.dtype, "g");
  STD_TORCH_CHECK(g.numel() == (c.w_gate ? u.numel() : 0), "fastattn::", kOp,
                  ": g must be the forward's, with w_gate as long as u");
  check(a, c.M * c.F, c.dtype, "a"), check(s, c.M * c.Dout, c.x_dtype, "s");
  check(mean, c.M, DType::kF32, "mean"), check(rstd, c.M, DType::kF32, "rstd");
  STD_TORCH_CHECK((c.norm == Norm::kNone || rstd.numel() == c.M) &&
                      (c.norm != Norm::kLayer || mean.numel() == c.M),
                  "fastattn::", kOp, ": mean and rstd must be the forward's");
  STD_TORCH_CHECK(c.post == Norm::kNone || s.numel() == c.M * c.Dout, "fastattn::", kOp,
                  ": s must be the forward's");
  const Saved saved{s, mean, rstd, u, g, a};
  Grads r = Backward(c, dy, saved, need).run();
  return {r.dx, r.dw1, r.db1, r.dw2, r.db2, r.dw_gate, r.db_gate, r.dnorm_weight, r.dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layernorm_ffn_fwd", TORCH_BOX(&layernorm_ffn_fwd));
  m.impl("layernorm_ffn_bwd", TORCH_BOX(&layernorm_ffn_bwd));
}
