// torch.ops.fastattn.recurrence_cuda_kernel_{fwd,bwd}: the recurrence by the CUDA C++ kernels that
// keep W_hh resident, and recurrence_cuda_tier, whether they can. Checks, allocation, launch.
// Stable ABI only. Nothing is read back from the device and nothing waits for it.
//
// Schemas and the loop of the tier with a GEMM a step are Python (fastattn/ops/recurrent_cuda.py);
// recurrence_cuda_step_{fwd,bwd} are what surrounds that GEMM.

#include "../cuda/recurrent.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "row_args.h"
#include "stand_in.h"

namespace {

using namespace fastattn::binding;
using fastattn::DType;
using fastattn::cuda::Cell;
using fastattn::cuda::kMaxDirections;
using fastattn::cuda::Launch;
using fastattn::cuda::RecurrentGrads;
using fastattn::cuda::RecurrentParams;
using fastattn::cuda::RecurrentPlan;
using fastattn::cuda::RecurrentRoom;
using fastattn::cuda::RecurrentScratch;
using fastattn::cuda::RecurrentTier;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "recurrence_cuda";
#define FASTATTN_RNN_CHECK(cond, ...) STD_TORCH_CHECK(cond, "fastattn::", kOp, ": ", __VA_ARGS__)

std::string text(const Shape& shape) {
  std::string s = "(";
  for (size_t d = 0; d < shape.size(); ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
  return s + (shape.size() == 1 ? ",)" : ")");
}
using fastattn::binding::text;

struct Numbers {
  int64_t T, cell, reverse;
};

int int_of(int64_t n, const char* name) {
  FASTATTN_RNN_CHECK(n >= 0 && n < std::numeric_limits<int>::max() / 8, name,
                     " must not be negative and below 2^28, got ", n);
  return int(n);
}

// The parameters of a launch, checked.
struct Call {
  RecurrentParams p;
  Device device;

  // typed: of the call's dtype and device. state: (D, B, P).
  Call(const Tensor& typed, const char* name, const Tensor& state, int64_t N, const Numbers& n)
      : device(typed) {
    FASTATTN_RNN_CHECK(n.cell >= 0 && n.cell <= 3, "cell must be 0, 1, 2 or 3, got ", n.cell);
    FASTATTN_RNN_CHECK(state.dim() == 3, "h0 must have shape (D, B, P), got ", text(state));
    p.cell = Cell(n.cell), p.dtype = row_dtype(kOp, typed, name), p.N = N;
    p.D = int_of(state.size(0), "D"), p.B = int_of(state.size(1), "B");
    p.P = p.H = int_of(state.size(2), "P");
    FASTATTN_RNN_CHECK(p.D >= 1 && p.D <= kMaxDirections, "h0 must have 1 or 2 directions, got ",
                       p.D);
    FASTATTN_RNN_CHECK(p.H > 0, "h0 must have a feature, got ", text(state));
    p.T = int_of(n.T, "T");
    FASTATTN_RNN_CHECK(n.reverse >= 0 && n.reverse < 1 << p.D,
                       "reverse must have a bit a direction, got ", n.reverse);
    p.reverse = int(n.reverse);
  }
  // Of the kernels that keep W_hh.
  Call(const Tensor& h0, int64_t N, const Tensors& w_hh, const Tensors& w_hr, const Numbers& n)
      : Call(h0, "h0", h0, N, n) {
    FASTATTN_RNN_CHECK(w_hr.empty(), "w_hr: a projection takes a GEMM a step");
    FASTATTN_RNN_CHECK(int64_t(w_hh.size()) == p.D, "w_hh must have ", p.D, " tensors, got ",
                       w_hh.size());
    p.h0 = operand(h0, {p.D, p.B, p.P}, "h0");
    for (int d = 0; d < p.D; ++d)
      p.w_hh[d] = operand(w_hh[size_t(d)], {gates() * p.H, p.P}, "w_hh");
  }

  int64_t gates() const { return recurrent_gates(p.cell); }

  // A tensor that the kernels read, of that shape and h0's dtype.
  const void* operand(const Tensor& x, const Shape& shape, const char* name) const {
    FASTATTN_RNN_CHECK(shape_of(x) == shape && x.is_contiguous(), name, " must have shape ",
                       text(shape), " and be contiguous, got ", text(x));
    FASTATTN_RNN_CHECK(row_dtype(kOp, x, name) == p.dtype, name, " must have h0's dtype");
    return read(x, name);
  }
  const void* optional(const Opt& x, const Shape& shape, const char* name) const {
    return x ? operand(*x, shape, name) : nullptr;
  }
  const void* read(const Tensor& x, const char* name) const {
    FASTATTN_RNN_CHECK(Device(x) == device, name, " must be on h0's device");
    reachable(x, Access::kRead, name);
    return x.const_data_ptr();
  }

  void set_biases(const Tensors& b_hn) {
    if (b_hn.empty()) return;
    FASTATTN_RNN_CHECK(p.cell == Cell::kGru, "b_hn is the GRU's alone");
    FASTATTN_RNN_CHECK(int64_t(b_hn.size()) == p.D, "b_hn must have ", p.D,
                       " tensors or none, got ", b_hn.size());
    for (int d = 0; d < p.D; ++d) p.b_hn[d] = operand(b_hn[size_t(d)], {p.H}, "b_hn");
  }
  void set_state(const Opt& c0, const Opt& h_mask) {
    FASTATTN_RNN_CHECK(c0.has_value() == (p.cell == Cell::kLstm),
                       "c0 is the LSTM's, which needs it");
    p.c0 = optional(c0, {p.D, p.B, p.H}, "c0");
    p.h_mask = optional(h_mask, {p.D, p.B, p.P}, "h_mask");
  }
  void set_rows(const Opt& offsets, const Opt& lengths) {
    if (offsets) {
      FASTATTN_RNN_CHECK(offsets->scalar_type() == ScalarType::Long && offsets->is_contiguous() &&
                             shape_of(*offsets) == Shape{int64_t(p.T) + 1},
                         "offsets must be int64 of shape (", p.T + 1, ",), got ", text(*offsets));
      p.offsets = static_cast<const int64_t*>(read(*offsets, "offsets"));
    } else {
      FASTATTN_RNN_CHECK(p.N == int64_t(p.T) * p.B, "gx must have T B = ", int64_t(p.T) * p.B,
                         " rows without offsets, got ", p.N);
    }
    if (!lengths) return;
    p.wide_lengths = lengths->scalar_type() == ScalarType::Long;
    FASTATTN_RNN_CHECK((p.wide_lengths || lengths->scalar_type() == ScalarType::Int) &&
                           lengths->is_contiguous() && shape_of(*lengths) == Shape{p.B},
                       "lengths must be int32 or int64 of shape (", p.B, ",), got ",
                       text(*lengths));
    p.lengths = read(*lengths, "lengths");
  }

  // A result of the kernels that the caller has made; null where it has none.
  void* into(const Opt& x, const Shape& shape, const char* name, DType dtype) const {
    if (!x || x->numel() == 0) return nullptr;
    FASTATTN_RNN_CHECK(shape_of(*x) == shape && x->is_contiguous(), name, " must have shape ",
                       text(shape), " and be contiguous, got ", text(*x));
    FASTATTN_RNN_CHECK(row_dtype(kOp, *x, name) == dtype && Device(*x) == device, name,
                       " must have the call's device and dtype");
    reachable(*x, Access::kFilledResult, name);
    return data(*x);
  }

  Tensor result(const Shape& shape, const char* name, Access access = Access::kResult) const {
    return of(shape, p.dtype, name, access);
  }
  Tensor scratch(int64_t bytes, const char* name, Access access) const {
    return of({bytes / 4}, DType::kF32, name, access);
  }

  RecurrentPlan plan(bool backward, int64_t from) const {
    RecurrentRoom room;
    const cudaError_t error = recurrent_room(p, backward, room);
    FASTATTN_RNN_CHECK(error == cudaSuccess,
                       "the GPU does not say what it has room for: ", cudaGetErrorName(error), " (",
                       cudaGetErrorString(error), ")");
    return recurrent_plan(p, backward, room, RecurrentTier(from));
  }
  // One that the kernels of this file can run.
  RecurrentPlan resident_plan(bool backward, int64_t from) const {
    const RecurrentPlan found = plan(backward, from);
    FASTATTN_RNN_CHECK(found.tier != RecurrentTier::kStep, "w_hh of H ", p.H,
                       " does not stay in this GPU's registers and shared memory: it takes a GEMM "
                       "a step");
    return found;
  }
  void check(const Launch& made, const char* way) const {
    check_launch(made, (std::string(kOp) + "_" + way).c_str(), "cell ", int(p.cell), " T ", p.T,
                 " B ", p.B, " H ", p.H, " D ", p.D);
  }

 private:
  Tensor of(const Shape& shape, DType dtype, const char* name, Access access) const {
    Shape strides(shape.size(), 1);
    for (size_t d = shape.size(); d-- > 1;)
      strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
    Tensor x = empty_on(device, shape, strides, dtype_code(dtype));
    reachable(x, access, name);
    return x;
  }
};

void* pointer(const Tensor& x) { return x.numel() ? data(x) : nullptr; }

void check_gx(Call& call, const Tensor& gx) {
  FASTATTN_RNN_CHECK(gx.dim() == 3, "gx must have shape (D, N, G H), got ",
                     fastattn::binding::text(gx));
  call.p.gx = call.operand(gx, {call.p.D, call.p.N, call.gates() * call.p.H}, "gx");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_fwd(
    Tensor gx, Tensors w_hh, Tensors b_hn, Tensors w_hr, Tensor h0, Opt c0, Opt h_mask, Opt offsets,
    Opt lengths, int64_t T, int64_t cell, int64_t reverse, bool save, int64_t tier) {
  const OnDeviceOf on(h0);
  Call call(h0, gx.dim() == 3 ? gx.size(1) : 0, w_hh, w_hr, {T, cell, reverse});
  RecurrentParams& p = call.p;
  check_gx(call, gx);
  call.set_biases(b_hn), call.set_state(c0, h_mask), call.set_rows(offsets, lengths);
  const bool lstm = p.cell == Cell::kLstm, has_gates = lstm || p.cell == Cell::kGru;
  Tensor y = call.result({p.N, int64_t(p.D) * p.P}, "y");
  Tensor h_n = call.result({p.D, p.B, p.P}, "h_n");
  Tensor c_n = call.result(lstm ? Shape{p.D, p.B, p.H} : Shape{0}, "c_n");
  Tensor gates =
      call.result(save && has_gates ? Shape{p.D, p.N, 4 * int64_t(p.H)} : Shape{0}, "gates");
  Tensor cells = call.result(save && lstm ? Shape{p.D, p.N, p.H} : Shape{0}, "cells");
  if (p.T == 0 || p.B == 0) {
    h_n = torch::stable::clone(h0);
    if (lstm) c_n = torch::stable::clone(*c0);
    return {y, h_n, c_n, gates, cells};
  }
  p.y = pointer(y), p.h_n = pointer(h_n), p.c_n = pointer(c_n);
  p.gates = pointer(gates), p.cells = pointer(cells);
  const RecurrentPlan plan = call.resident_plan(false, tier);
  const RecurrentScratch size = recurrent_scratch(p, false, plan);
  Tensor shared = call.scratch(size.shared, "exchange", Access::kFilledResult);  // zeroed
  Tensor carried = call.scratch(size.carried, "carried", Access::kResult);
  call.check(recurrent_forward(p, plan, pointer(shared), pointer(carried), on.stream), "fwd");
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_bwd(
    Opt dy, Opt dh_n, Opt dc_n, Tensor y, Tensor gates, Tensor cells, Tensors w_hh, Tensors w_hr,
    Tensor h0, Opt c0, Opt h_mask, Opt offsets, Opt lengths, int64_t T, int64_t cell,
    int64_t reverse, int64_t tier) {
  const OnDeviceOf on(h0);
  Call call(h0, y.dim() == 2 ? y.size(0) : 0, w_hh, w_hr, {T, cell, reverse});
  RecurrentParams& p = call.p;
  call.set_state(c0, h_mask), call.set_rows(offsets, lengths);
  const bool lstm = p.cell == Cell::kLstm, gru = p.cell == Cell::kGru;
  const Shape y_shape = {p.N, int64_t(p.D) * p.P}, state = {p.D, p.B, p.H};
  p.y = const_cast<void*>(call.operand(y, y_shape, "y"));
  if (lstm || gru)
    p.gates = const_cast<void*>(call.operand(gates, {p.D, p.N, 4 * int64_t(p.H)}, "gates"));
  if (lstm) p.cells = const_cast<void*>(call.operand(cells, {p.D, p.N, p.H}, "cells"));
  RecurrentGrads g;
  g.dy = call.optional(dy, y_shape, "dy"), g.dh_n = call.optional(dh_n, state, "dh_n");
  if (lstm) g.dc_n = call.optional(dc_n, state, "dc_n");
  Tensor dgx = call.result({p.D, p.N, call.gates() * p.H}, "dgx");
  Tensor dghn = call.result(gru ? Shape{p.D, p.N, p.H} : Shape{0}, "dghn");
  Tensor dh0 = call.result(state, "dh0"), dc0 = call.result(lstm ? state : Shape{0}, "dc0");
  Tensor dh = call.result({0}, "dh");
  if (p.T == 0 || p.B == 0) {
    const auto given = [](const Opt& x, Tensor& to) {
      if (x)
        to = torch::stable::clone(*x);
      else
        torch::stable::zero_(to);
    };
    given(dh_n, dh0);
    if (lstm) given(dc_n, dc0);
    return {dgx, dghn, dh0, dc0, dh};
  }
  g.dgx = pointer(dgx), g.dghn = pointer(dghn), g.dh0 = pointer(dh0), g.dc0 = pointer(dc0);
  const RecurrentPlan plan = call.resident_plan(true, tier);
  const RecurrentScratch size = recurrent_scratch(p, true, plan);
  Tensor shared = call.scratch(size.shared, "exchange", Access::kFilledResult);  // zeroed
  Tensor carried = call.scratch(size.carried, "carried", Access::kResult);
  call.check(recurrent_backward(p, g, plan, pointer(shared), pointer(carried), on.stream), "bwd");
  return {dgx, dghn, dh0, dc0, dh};
}

// ---- one step around a GEMM --------------------------------------------------------------------

using fastattn::cuda::RecurrentStep;

// `part` 1: what a projection adds to a step.
void set_products(Call& call, RecurrentStep& step, const Tensors& product, int64_t width) {
  FASTATTN_RNN_CHECK(int64_t(product.size()) == call.p.D, "product must have ", call.p.D,
                     " tensors, got ", product.size());
  for (int d = 0; d < call.p.D; ++d)
    step.product[d] = call.operand(product[size_t(d)], {call.p.B, width}, "product");
}

void recurrence_step_fwd(Tensor gx, Tensors product, Tensors b_hn, Opt h_mask, Opt offsets,
                         Opt lengths, int64_t T, int64_t cell, int64_t reverse, int64_t s,
                         int64_t part, Tensor h, Opt c, Tensor next, Tensor y, Opt gates,
                         Opt cells) {
  const OnDeviceOf on(gx);
  Call call(gx, "gx", h, gx.dim() == 3 ? gx.size(1) : 0, {T, cell, reverse});
  RecurrentParams& p = call.p;
  FASTATTN_RNN_CHECK(gx.dim() == 3 && gx.size(2) % call.gates() == 0,
                     "gx must have shape (D, N, G H), got ", fastattn::binding::text(gx));
  p.H = int_of(gx.size(2) / call.gates(), "H");
  FASTATTN_RNN_CHECK(s >= 0 && s < T, "s must be a step, got ", s, " of ", T);
  check_gx(call, gx);
  call.set_biases(b_hn), call.set_rows(offsets, lengths);
  p.h_mask = call.optional(h_mask, {p.D, p.B, p.P}, "h_mask");
  const bool lstm = p.cell == Cell::kLstm;
  FASTATTN_RNN_CHECK(c.has_value() == lstm, "c is the LSTM's, which needs it");
  FASTATTN_RNN_CHECK(p.P == p.H || lstm, "a projection is the LSTM's alone");
  const Shape state = {p.D, p.B, p.H}, out = {p.D, p.B, p.P};
  RecurrentStep step;
  step.s = int(s);
  step.h = static_cast<float*>(call.into(h, out, "h", DType::kF32));
  step.c = static_cast<float*>(call.into(c, state, "c", DType::kF32));
  step.next = call.into(next, part ? out : state, "next", p.dtype);
  p.y = call.into(y, {p.N, int64_t(p.D) * p.P}, "y", p.dtype);
  p.gates = call.into(gates, {p.D, p.N, 4 * int64_t(p.H)}, "gates", p.dtype);
  p.cells = call.into(cells, {p.D, p.N, p.H}, "cells", p.dtype);
  set_products(call, step, product, part ? p.P : call.gates() * p.H);
  step.p = p;
  call.check(
      part ? recurrent_step_project(step, on.stream) : recurrent_step_forward(step, on.stream),
      "step_fwd");
}

void recurrence_step_bwd(Opt dy, Tensors product, Tensor y, Tensor gates, Tensor cells, Tensor h0,
                         Opt c0, Opt h_mask, Opt offsets, Opt lengths, int64_t T, int64_t cell,
                         int64_t reverse, int64_t s, int64_t part, Tensor h, Opt c, Tensor next,
                         Tensor dgx, Opt dghn, Opt dh) {
  const OnDeviceOf on(h0);
  Call call(h0, "h0", h0, y.dim() == 2 ? y.size(0) : 0, {T, cell, reverse});
  RecurrentParams& p = call.p;
  FASTATTN_RNN_CHECK(dgx.dim() == 3 && dgx.size(2) % call.gates() == 0,
                     "dgx must have shape (D, N, G H), got ", fastattn::binding::text(dgx));
  p.H = int_of(dgx.size(2) / call.gates(), "H");
  FASTATTN_RNN_CHECK(s >= 0 && s <= T, "s must be a step or the end, got ", s, " of ", T);
  call.set_state(c0, h_mask), call.set_rows(offsets, lengths);
  const bool lstm = p.cell == Cell::kLstm, gru = p.cell == Cell::kGru;
  FASTATTN_RNN_CHECK(c.has_value() == lstm, "c is the LSTM's, which needs it");
  FASTATTN_RNN_CHECK(p.P == p.H || lstm, "a projection is the LSTM's alone");
  const Shape y_shape = {p.N, int64_t(p.D) * p.P}, out = {p.D, p.B, p.P};
  const int64_t wide = call.gates() * p.H;
  p.h0 = call.operand(h0, out, "h0");
  p.y = const_cast<void*>(call.operand(y, y_shape, "y"));
  if (lstm || gru)
    p.gates = const_cast<void*>(call.operand(gates, {p.D, p.N, 4 * int64_t(p.H)}, "gates"));
  if (lstm) p.cells = const_cast<void*>(call.operand(cells, {p.D, p.N, p.H}, "cells"));
  RecurrentStep step;
  step.s = int(s);
  step.g.dy = call.optional(dy, y_shape, "dy");
  step.h = static_cast<float*>(call.into(h, out, "h", DType::kF32));
  step.c = static_cast<float*>(call.into(c, {p.D, p.B, p.H}, "c", DType::kF32));
  step.next = call.into(next, part ? out : Shape{p.D, p.B, wide}, "next", p.dtype);
  step.g.dgx = call.into(dgx, {p.D, p.N, wide}, "dgx", p.dtype);
  step.g.dghn = gru ? call.into(dghn, {p.D, p.N, p.H}, "dghn", p.dtype) : nullptr;
  step.dh = call.into(dh, {p.D, p.N, p.P}, "dh", p.dtype);
  const bool projected = p.P != p.H;
  FASTATTN_RNN_CHECK(!part || (projected && step.dh), "part 1 is a projection's, and needs dh");
  // The first step of the backward has nothing behind it.
  if (s > 0 || (projected && !part))
    set_products(call, step, product, part || !projected ? p.P : p.H);
  step.p = p;
  call.check(
      part ? recurrent_step_gather(step, on.stream) : recurrent_step_backward(step, on.stream),
      "step_bwd");
}

// RecurrentTier of calls of such weights with B sequences; like: a tensor of the dtype and device.
int64_t recurrence_tier(Tensor like, int64_t B, int64_t H, int64_t P, int64_t D, int64_t cell,
                        bool backward, int64_t from) {
  const OnDeviceOf on(like);
  RecurrentParams p;
  p.T = 1, p.B = int_of(B, "B"), p.H = int_of(H, "H"), p.P = int_of(P, "P"), p.D = int_of(D, "D");
  p.dtype = row_dtype(kOp, like, "like"), p.cell = Cell(cell);
  RecurrentRoom room;
  const cudaError_t error = recurrent_room(p, backward, room);
  FASTATTN_RNN_CHECK(error == cudaSuccess,
                     "the GPU does not say what it has room for: ", cudaGetErrorName(error), " (",
                     cudaGetErrorString(error), ")");
  return int64_t(recurrent_plan(p, backward, room, RecurrentTier(from)).tier);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, FASTATTN_GPU_KEY, m) {
  m.impl("recurrence_cuda_kernel_fwd", TORCH_BOX(&recurrence_fwd));
  m.impl("recurrence_cuda_kernel_bwd", TORCH_BOX(&recurrence_bwd));
  m.impl("recurrence_cuda_step_fwd", TORCH_BOX(&recurrence_step_fwd));
  m.impl("recurrence_cuda_step_bwd", TORCH_BOX(&recurrence_step_bwd));
  m.impl("recurrence_cuda_tier", TORCH_BOX(&recurrence_tier));
}
