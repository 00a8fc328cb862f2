// torch.ops.fastattn.recurrent_step_cpu_{fwd,bwd}: checks, allocation, launch. One step of one
// direction with its products, fp32; the autograd Function around it is Python.

#include "../cpu/recurrent_step.h"

#include <tuple>

#include "row_args.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "recurrent_step";

// The arguments that both ways share, checked.
class Call {
 public:
  StepParams p;

  Call(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const Opt& b_ih, const Opt& b_hh,
       const Tensor& h, const Opt& c, int64_t cell) {
    check(cell >= 0 && cell <= 3, "cell must be 0 to 3");
    check(x.dim() == 2 && h.dim() == 2, "x must have shape (B, I) and h (B, H)");
    p.cell = Cell(cell), p.B = x.size(0), p.I = x.size(1), p.H = h.size(1);
    check(p.B > 0, "there must be a sequence");
    check(p.I > 0 && p.I % kStepMultiple == 0 && p.H > 0 && p.H % kStepMultiple == 0,
          "I and H must be multiples of 16");
    const int64_t rows = kGates[cell] * p.H;
    p.x = floats(x, {p.B, p.I}, "x must have shape (B, I)");
    p.h = floats(h, {p.B, p.H}, "h must have shape (B, H)");
    p.w_ih = floats(w_ih, {rows, p.I}, "w_ih must have shape (G H, I)");
    p.w_hh = floats(w_hh, {rows, p.H}, "w_hh must have shape (G H, H)");
    p.b_ih = optional(b_ih, {rows}, "b_ih must have shape (G H,)");
    p.b_hh = optional(b_hh, {rows}, "b_hh must have shape (G H,)");
    if (p.cell != Cell::kLstm) return;
    check(c.has_value(), "c must be given");
    p.c = floats(*c, {p.B, p.H}, "c must have shape (B, H)");
  }

  const float* floats(const Tensor& x, const Shape& shape, const char* what) {
    STD_TORCH_CHECK(shape_of(x) == shape, "fastattn::", kOp, ": ", what, ", got ", text(x));
    check(x.scalar_type() == ScalarType::Float, "all operands must be float32");
    if (x.is_contiguous()) return static_cast<const float*>(x.const_data_ptr());
    kept_.push_back(torch::stable::contiguous(x));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }
  const float* optional(const Opt& x, const Shape& shape, const char* what) {
    return x ? floats(*x, shape, what) : nullptr;
  }

 private:
  static void check(bool right, const char* what) {
    STD_TORCH_CHECK(right, "fastattn::", kOp, ": ", what);
  }
  std::vector<Tensor> kept_;
};

Tensor result(const Shape& shape) { return empty(shape, DType::kF32); }

std::tuple<Tensor, Tensor, Tensor> step_fwd(Tensor x, Tensor w_ih, Tensor w_hh, Opt b_ih, Opt b_hh,
                                            Tensor h, Opt c, int64_t cell, bool save) {
  Call call(x, w_ih, w_hh, b_ih, b_hh, h, c, cell);
  StepParams& p = call.p;
  const bool lstm = p.cell == Cell::kLstm;
  Tensor h_new = result({p.B, p.H}), c_new = lstm ? result({p.B, p.H}) : nothing();
  Tensor gates = save && kSaved[cell] ? result({p.B, kSaved[cell] * p.H}) : nothing();
  p.h_new = binding::floats(h_new), p.c_new = binding::floats(c_new);
  p.gates = binding::floats(gates);
  recurrent_step_forward(p, threads());
  return {h_new, c_new, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_bwd(
    Opt dh_new, Opt dc_new, Tensor x, Tensor w_ih, Tensor w_hh, Opt b_ih, Opt b_hh, Tensor h, Opt c,
    Tensor h_new, Tensor c_new, Tensor gates, int64_t cell, int64_t need) {
  Call call(x, w_ih, w_hh, b_ih, b_hh, h, c, cell);
  StepParams& p = call.p;
  const bool lstm = p.cell == Cell::kLstm;
  const Shape states{p.B, p.H};
  StepGrads g;
  g.dh_new = call.optional(dh_new, states, "dh must have h's shape");
  g.dc_new = call.optional(lstm ? dc_new : Opt{}, states, "dc must have c's shape");
  const auto saved = [&](const Tensor& t, const Shape& shape, const char* what) {
    return const_cast<float*>(call.floats(t, shape, what));
  };
  p.h_new = saved(h_new, states, "the new h must have h's shape");
  if (lstm) p.c_new = saved(c_new, states, "the new c must have c's shape");
  if (kSaved[cell])
    p.gates = saved(gates, {p.B, kSaved[cell] * p.H}, "gates must be the forward's");
  // x, w_ih, w_hh, b_ih, b_hh, h, c: those of `need`; the others are empty.
  const int64_t rows = kGates[cell] * p.H;
  const Shape shapes[] = {{p.B, p.I}, {rows, p.I}, {rows, p.H}, {rows}, {rows}, states, states};
  float** const to[] = {&g.dx, &g.dw_ih, &g.dw_hh, &g.db_ih, &g.db_hh, &g.dh, &g.dc};
  Tensor made[7] = {nothing(), nothing(), nothing(), nothing(), nothing(), nothing(), nothing()};
  for (int i = 0; i < 7; ++i)
    if (need >> i & 1) made[i] = result(shapes[i]), *to[i] = binding::floats(made[i]);
  recurrent_step_backward(p, g, threads());
  return {made[0], made[1], made[2], made[3], made[4], made[5], made[6]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("recurrent_step_cpu_fwd", TORCH_BOX(&step_fwd));
  m.impl("recurrent_step_cpu_bwd", TORCH_BOX(&step_bwd));
}
