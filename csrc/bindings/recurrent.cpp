// torch.ops.fastattn.recurrence_cpu_{layer,fwd,bwd}: checks, allocation, launch. One layer of an
// LSTM, a GRU or an RNN, with or after the product of its inputs; the op around it is Python.

#include "../cpu/recurrent.h"

#include <numeric>
#include <tuple>

#include "products.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "recurrence";

struct Weights {
  Opt w_hh, w_hh_reverse, b_ih, b_ih_reverse, b_hh, b_hh_reverse, w_hr, w_hr_reverse;
};

// The arguments that both directions share, checked.
class Call {
 public:
  RecurrentParams p;
  DType dtype;

  Call(const Tensor& gx, const Shape& gx_shape, Opt gh, Weights w, Tensor h0, Opt c0, Opt h_mask,
       Opt offsets, Opt lengths, int64_t T, int64_t cell, int64_t reverse) {
    dtype = row_dtype(kOp, gx, "the input");
    check(cell >= 0 && cell <= 3, "cell must be 0 to 3");
    check(h0.dim() == 3 && gx_shape.size() == 3 && h0.size(0) == gx_shape[0] && h0.size(0) >= 1 &&
              h0.size(0) <= 2,
          "gx must have shape (D, N, G H) and h0 (D, B, P), D 1 or 2");
    check(T >= 0 && T < INT64_MAX, "T must be from 0 to 2^63 - 2");
    p.cell = Cell(cell), p.dtype = dtype, p.D = int(h0.size(0)), p.P = h0.size(2);
    check(p.P > 0, "h0 must have features");
    check(reverse >= 0 && reverse < 1 << p.D, "reverse must have a bit a direction");
    p.reverse = unsigned(reverse);
    const int64_t G = kGates[cell];
    check(gx_shape[2] > 0 && gx_shape[2] % G == 0, "gx must have G H columns");
    p.H = gx_shape[2] / G;
    p.steps.T = T, p.steps.B = h0.size(1), p.steps.N = gx_shape[1];
    p.h0 = operand(h0, {p.D, p.steps.B, p.P}, "h0 must have shape (D, B, P)");
    if (p.cell == Cell::kLstm) {
      check(c0.has_value(), "c0 must be given");
      p.c0 = operand(*c0, {p.D, p.steps.B, p.H}, "c0 must have shape (D, B, H)");
    }
    p.h_mask = optional(h_mask, {p.D, p.steps.B, p.P}, "h_mask must have h0's shape");
    const bool projected = w.w_hr.has_value();
    check(!projected || p.cell == Cell::kLstm, "a projection is LSTM's alone");
    check(projected || p.P == p.H, "h0 must have H features where there is no projection");
    const Opt *w_hh[] = {&w.w_hh, &w.w_hh_reverse}, *b_ih[] = {&w.b_ih, &w.b_ih_reverse},
              *b_hh[] = {&w.b_hh, &w.b_hh_reverse}, *w_hr[] = {&w.w_hr, &w.w_hr_reverse};
    for (int d = 0; d < p.D; ++d) {
      check(w_hh[d]->has_value(), "w_hh must be given for every direction");
      check(w_hr[d]->has_value() == projected, "w_hr must be given for every direction");
      check(shape_of(**w_hh[d]) == Shape{G * p.H, p.P}, "w_hh must have shape (G H, P)");
      if (!gh) p.w_hh[d] = optional(*w_hh[d], {G * p.H, p.P}, "w_hh must have shape (G H, P)");
      p.b_ih[d] = optional(*b_ih[d], {G * p.H}, "b_ih must have shape (G H,)");
      p.b_hh[d] = optional(*b_hh[d], {G * p.H}, "b_hh must have shape (G H,)");
      p.w_hr[d] = optional(*w_hr[d], {p.P, p.H}, "w_hr must have shape (P, H)");
    }
    check(!gh || (T == 1 && !projected), "gh is for one step");
    p.gh = optional(gh, {p.D, p.steps.B, G * p.H}, "gh must have shape (D, B, G H)");
    steps(offsets, lengths);
  }

  // Whether there is a step to make.
  bool any() const { return p.steps.N > 0 && p.steps.B > 0; }

  const void* optional(const Opt& x, const Shape& shape, const char* what) {
    return x ? operand(*x, shape, what) : nullptr;
  }
  // x's data; null where it is empty.
  const void* operand(const Tensor& x, const Shape& shape, const char* what) {
    return keep(x, shape, what).const_data_ptr();
  }

 private:
  static void check(bool right, const char* what) {
    STD_TORCH_CHECK(right, "fastattn::", kOp, ": ", what);
  }

  Tensor keep(const Tensor& x, const Shape& shape, const char* what) {
    STD_TORCH_CHECK(shape_of(x) == shape, "fastattn::", kOp, ": ", what, ", got ", text(x));
    STD_TORCH_CHECK(row_dtype(kOp, x, "an operand") == dtype, "fastattn::", kOp,
                    ": all operands must have one dtype");
    kept_.push_back(torch::stable::contiguous(x));
    return kept_.back();
  }

  static std::vector<int64_t> integers(const Tensor& given, int64_t n, const char* what) {
    check(given.dim() == 1 && given.size(0) == n, what);
    const Tensor x = torch::stable::contiguous(given);
    std::vector<int64_t> out(n);
    if (x.scalar_type() == ScalarType::Long)
      std::copy_n(static_cast<const int64_t*>(x.const_data_ptr()), n, out.begin());
    else if (x.scalar_type() == ScalarType::Int)
      std::copy_n(static_cast<const int32_t*>(x.const_data_ptr()), n, out.begin());
    else
      check(false, what);
    return out;
  }

  void steps(const Opt& offsets, const Opt& lengths) {
    const int64_t T = p.steps.T, B = p.steps.B, N = p.steps.N;
    check(!offsets || !lengths, "offsets and lengths exclude each other");
    if (offsets) {
      offsets_ = integers(*offsets, T + 1, "offsets must have shape (T + 1,), int64 or int32");
      check(offsets_[0] == 0 && offsets_[T] == N, "offsets must run from 0 to gx's rows");
      int64_t most = B;
      for (int64_t t = 0; t < T; ++t) {
        const int64_t n = offsets_[t + 1] - offsets_[t];
        check(n >= 0 && n <= most, "offsets must rise by steps that do not, of at most B");
        most = n;
      }
      p.steps.offsets = offsets_.data();
      return;
    }
    // T B itself may be beyond an int64.
    STD_TORCH_CHECK(B == 0 ? N == 0 : N % B == 0 && N / B == T, "fastattn::", kOp,
                    ": gx must have T B rows, T = ", T, ", B = ", B, ", got ", N);
    if (!lengths) return;
    const std::vector<int64_t> given =
        integers(*lengths, B, "lengths must have shape (B,), int64 or int32");
    index_.resize(B), lengths_.resize(B), active_.assign(B ? T : 0, 0);
    std::iota(index_.begin(), index_.end(), 0);
    std::stable_sort(index_.begin(), index_.end(),
                     [&](int64_t a, int64_t b) { return given[a] > given[b]; });
    for (int64_t k = 0; k < B; ++k) {
      lengths_[k] = given[index_[k]];
      STD_TORCH_CHECK(lengths_[k] >= 0 && lengths_[k] <= T, "fastattn::", kOp,
                      ": lengths must be in [0, ", T, "], got ", lengths_[k]);
      for (int64_t t = 0; t < lengths_[k]; ++t) ++active_[t];
    }
    p.steps.index = index_.data(), p.steps.lengths = lengths_.data();
    p.steps.active = active_.data();
  }

  std::vector<Tensor> kept_;
  std::vector<int64_t> offsets_, index_, lengths_, active_;
};

Tensor copy_of(const void* data, const Shape& shape, DType dtype) {
  Tensor x = empty(shape, dtype);
  if (x.numel())
    std::memcpy(const_cast<void*>(x.const_data_ptr()), data, x.numel() * x.element_size());
  return x;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The product of the inputs, made a part at a time: a whole gx is written to memory once and read
// from there again, and beyond some 32 MB its pages are new ones in every call. A part is large
// enough for the library to pack w_ih for it.
class Inputs {
 public:
  Inputs(const Tensor& x, const Tensor& w_ih, const Opt& w_ih_reverse) : x_(x), w_{w_ih} {
    if (w_ih_reverse) w_.push_back(*w_ih_reverse);
    for (const Tensor& w : w_) {
      STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && w.size(1) == x.size(1), "fastattn::", kOp,
                      ": x must have shape (N, I) and w_ih (G H, I), got ", text(x), " and ",
                      text(w));
      STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), "fastattn::", kOp,
                      ": x and w_ih must have one dtype");
      STD_TORCH_CHECK(w.size(0) == w_ih.size(0), "fastattn::", kOp,
                      ": the directions' w_ih must have one shape");
    }
  }
  Shape gx_shape() const { return {int64_t(w_.size()), x_.size(0), w_[0].size(0)}; }

  // Cuts p's steps, where gx may be in parts.
  void cut(RecurrentParams& p, DType dtype, bool whole) {
    constexpr int64_t kLeast = 1024, kBytes = 8 << 20;
    const int64_t N = p.steps.N, T = p.steps.T,
                  row = w_[0].size(0) * (dtype == DType::kF32 ? 4 : 2);
    const int64_t parts = whole ? 1 : N / std::max(kLeast, kBytes / (p.D * row)), most = p.D * N;
    bounds_ = {0};
    int64_t here = 0;
    for (int64_t s = 0; s + 1 < T && parts > 1; ++s) {
      for (int d = 0; d < p.D; ++d) here += p.end_row(d, s, s + 1) - p.first_row(d, s, s + 1);
      if (here < (most + parts - 1) / parts) continue;
      bounds_.push_back(s + 1), here = 0;
    }
    bounds_.push_back(T);
    p.parts.n = int64_t(bounds_.size()) - 1, p.parts.bounds = bounds_.data();
    for (int64_t i = 0; i < p.parts.n; ++i)
      for (int d = 0; d < p.D; ++d) {
        const int64_t s0 = bounds_[i], s1 = bounds_[i + 1];
        p.parts.rows = std::max(p.parts.rows, p.end_row(d, s0, s1) - p.first_row(d, s0, s1));
      }
    gx_ = empty({p.D, p.parts.rows, w_[0].size(0)}, dtype);
    p.gx = gx_.const_data_ptr(), p.parts.ctx = this;
    p.parts.make = [](void* self, int d, int64_t first, int64_t rows) {
      static_cast<const Inputs*>(self)->make(d, first, rows);
    };
  }
  // All of it, where it is whole.
  const Tensor& gx() const { return gx_; }

 private:
  void make(int d, int64_t first, int64_t rows) const {
    const int64_t I = x_.size(1), columns = w_[0].size(0);
    if (rows > 0)
      product(view2(x_, rows, I, x_.stride(0), x_.stride(1), first * x_.stride(0)),
              transposed(w_[d]), view2(gx_, rows, columns, columns, 1, d * gx_.size(1) * columns));
  }

  const Tensor x_;
  std::vector<Tensor> w_;
  std::vector<int64_t> bounds_;
  Tensor gx_;
};

// gx or inputs: what the gates are made of.
Results forward(Call& c, const Tensor* gx, Inputs* inputs, const Tensor& h0, bool save) {
  RecurrentParams& p = c.p;
  const int cell = int(p.cell);
  const Shape h_shape{p.D, p.steps.B, p.P}, c_shape{p.D, p.steps.B, p.H};
  const bool lstm = p.cell == Cell::kLstm;
  Tensor y = empty({p.steps.N, p.D * p.P}, c.dtype);
  if (!c.any())
    return {y, copy_of(p.h0, h_shape, c.dtype),
            lstm ? copy_of(p.c0, c_shape, c.dtype) : nothing(c.dtype), nothing(c.dtype),
            nothing(c.dtype)};
  Tensor h_n = empty(h_shape, c.dtype), c_n = lstm ? empty(c_shape, c.dtype) : nothing(c.dtype);
  // LSTM's gates overwrite what they are made of.
  const bool over = save && lstm;
  Tensor cells = over ? empty({p.D, p.steps.N, p.H}, c.dtype) : nothing(c.dtype);
  if (gx) {
    p.gx = c.operand(*gx, shape_of(*gx), "gx");
    STD_TORCH_CHECK(!over || p.gx == gx->const_data_ptr(), "fastattn::", kOp,
                    ": gx must be contiguous");
  } else {
    inputs->cut(p, c.dtype, over);
  }
  Tensor gates = over && inputs ? inputs->gx() : nothing(c.dtype);
  if (save && kSaved[cell] && !lstm) gates = empty({p.D, p.steps.N, kSaved[cell] * p.H}, c.dtype);
  p.y = data(y), p.h_n = data(h_n), p.c_n = data(c_n);
  if (save) p.gates = over ? const_cast<void*>(p.gx) : data(gates), p.cells = data(cells);
  recurrent_forward(p, threads());
  return {y, h_n, c_n, gates, cells};
}

Results recurrence_fwd(Tensor gx, Opt gh, Opt w_hh, Opt w_hh_reverse, Opt b_ih, Opt b_ih_reverse,
                       Opt b_hh, Opt b_hh_reverse, Opt w_hr, Opt w_hr_reverse, Tensor h0, Opt c0,
                       Opt h_mask, Opt offsets, Opt lengths, int64_t T, int64_t cell,
                       int64_t reverse, bool save) {
  Call c(gx, shape_of(gx), gh,
         {w_hh, w_hh_reverse, b_ih, b_ih_reverse, b_hh, b_hh_reverse, w_hr, w_hr_reverse}, h0, c0,
         h_mask, offsets, lengths, T, cell, reverse);
  return forward(c, &gx, nullptr, h0, save);
}

Results recurrence_layer(Tensor x, Tensor w_ih, Opt w_ih_reverse, Opt gh, Opt w_hh,
                         Opt w_hh_reverse, Opt b_ih, Opt b_ih_reverse, Opt b_hh, Opt b_hh_reverse,
                         Opt w_hr, Opt w_hr_reverse, Tensor h0, Opt c0, Opt h_mask, Opt offsets,
                         Opt lengths, int64_t T, int64_t cell, int64_t reverse, bool save) {
  Inputs inputs(x, w_ih, w_ih_reverse);
  Call c(x, inputs.gx_shape(), gh,
         {w_hh, w_hh_reverse, b_ih, b_ih_reverse, b_hh, b_hh_reverse, w_hr, w_hr_reverse}, h0, c0,
         h_mask, offsets, lengths, T, cell, reverse);
  return forward(c, nullptr, &inputs, h0, save);
}

Results recurrence_bwd(Opt dy, Opt dh_n, Opt dc_n, Tensor y, Tensor gates, Tensor cells, Opt gh,
                       Opt w_hh, Opt w_hh_reverse, Opt w_hr, Opt w_hr_reverse, Tensor h0, Opt c0,
                       Opt h_mask, Opt offsets, Opt lengths, int64_t T, int64_t cell,
                       int64_t reverse) {
  STD_TORCH_CHECK(cell >= 0 && cell <= 3, "fastattn::", kOp, ": cell must be 0 to 3");
  STD_TORCH_CHECK(y.dim() == 2 && h0.dim() == 3, "fastattn::", kOp,
                  ": y must have shape (N, D P) and h0 (D, B, P)");
  int64_t H = h0.size(2);
  if (w_hr) {
    STD_TORCH_CHECK(w_hr->dim() == 2, "fastattn::", kOp, ": w_hr must have shape (P, H)");
    H = w_hr->size(1);
  }
  const Shape gx_shape{h0.size(0), y.size(0), kGates[cell] * H};
  Call c(y, gx_shape, gh, {w_hh, w_hh_reverse, {}, {}, {}, {}, w_hr, w_hr_reverse}, h0, c0, h_mask,
         offsets, lengths, T, cell, reverse);
  RecurrentParams& p = c.p;
  const int64_t D = p.D, B = p.steps.B, N = p.steps.N;
  const Shape h_shape{D, B, p.P}, c_shape{D, B, p.H};
  const bool lstm = p.cell == Cell::kLstm, gru = p.cell == Cell::kGru;
  RecurrentGrads g;
  g.dy = c.optional(dy, {N, D * p.P}, "dy must have y's shape");
  g.dh_n = c.optional(dh_n, h_shape, "dh_n must have h_n's shape");
  g.dc_n = c.optional(lstm ? dc_n : Opt{}, c_shape, "dc_n must have c_n's shape");
  Tensor dgx = empty(gx_shape, c.dtype);
  Tensor dghn = gru ? empty({D, N, p.H}, c.dtype) : nothing(c.dtype);
  Tensor dh0 = empty(h_shape, c.dtype), dc0 = lstm ? empty(c_shape, c.dtype) : nothing(c.dtype);
  Tensor dh = w_hr ? empty({D, N, p.P}, c.dtype) : nothing(c.dtype);
  if (!c.any()) {
    for (Tensor* x : {&dgx, &dghn, &dh0, &dc0, &dh})
      if (x->numel()) torch::stable::zero_(*x);
    if (dh_n && dh0.numel()) dh0 = copy_of(g.dh_n, h_shape, c.dtype);
    if (g.dc_n && dc0.numel()) dc0 = copy_of(g.dc_n, c_shape, c.dtype);
    return {dgx, dghn, dh0, dc0, dh};
  }
  p.y = const_cast<void*>(c.operand(y, {N, D * p.P}, "y must have shape (N, D P)"));
  if (kSaved[cell])
    p.gates = const_cast<void*>(
        c.operand(gates, {D, N, kSaved[cell] * p.H}, "gates must be the forward's"));
  if (lstm)
    p.cells = const_cast<void*>(c.operand(cells, {D, N, p.H}, "cells must be the forward's"));
  g.dgx = data(dgx), g.dghn = data(dghn), g.dh0 = data(dh0), g.dc0 = data(dc0), g.dh = data(dh);
  recurrent_backward(p, g, threads());
  return {dgx, dghn, dh0, dc0, dh};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("recurrence_cpu_layer", TORCH_BOX(&recurrence_layer));
  m.impl("recurrence_cpu_fwd", TORCH_BOX(&recurrence_fwd));
  m.impl("recurrence_cpu_bwd", TORCH_BOX(&recurrence_bwd));
}
