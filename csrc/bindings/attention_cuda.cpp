// torch.ops.fastattn.attention_cuda_kernel_{fwd,bwd}: the CUDA C++ kernels. Checks, allocation,
// launch. Stable ABI only. Nothing is read back from the device and nothing waits for it.
//
// The public ops, attention_cuda_{fwd,bwd}, are Python (fastattn/ops/attention_cuda.py): they look
// at the first-use verdict, below the compilers, and then call these.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "../cuda/attention.h"
#include "attention_args.h"
#include "device.h"
#include "stand_in.h"

namespace {

using fastattn::Operand;
using fastattn::Weights;
using fastattn::cuda::AttentionGrads;
using fastattn::cuda::AttentionParams;
using fastattn::cuda::BiasGrad;
using fastattn::cuda::Integers;
using fastattn::cuda::Launch;
using namespace fastattn::binding;

// The parameters of the launches, and what keeps their pointers alive until they are made.
struct Call {
  AttentionParams p;
  bool packed = false;
  Device device;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Shared& a) : device(q) {
    packed = a.cu_seqlens_q.has_value();
    set_qkv(p, q, k, v, packed);
    using fastattn::cuda::kMaxHeadDim;
    FASTATTN_CHECK(p.D <= kMaxHeadDim && p.Dv <= kMaxHeadDim,
                   "the CUDA kernels take head_dim up to ", kMaxHeadDim, ", got ", p.D, " and ",
                   p.Dv);
    read(q, "q"), read(k, "k"), read(v, "v");
    if (packed) {
      set_packed(q, k, a);
    } else {
      if (a.q_lens) p.q_lens = integers(*a.q_lens, p.B, "q_lens");
      if (a.k_lens) p.k_lens = integers(*a.k_lens, p.B, "k_lens");
    }
    FASTATTN_CHECK(int64_t(p.Sq) + p.Sk < 1 << 30, "Sq + Sk must be less than 2^30, got ",
                   int64_t(p.Sq) + p.Sk);
    set_features(p, a);
    if (a.mask) read(*a.mask, "mask");
    if (a.bias) read(*a.bias, "bias");
    if (a.alibi_slopes) p.alibi = floats(*a.alibi_slopes, "alibi_slopes");
    if (a.sinks) p.sinks = floats(*a.sinks, "sinks");
    if (p.dropout_p > 0.) {
      read(*a.seed, "seed");
      p.seed = static_cast<const int64_t*>(a.seed->const_data_ptr());
    }
  }

  auto allocator() const {
    return [device = device](const Shape& shape, const Shape& strides, int32_t dtype) {
      return empty_on(device, shape, strides, dtype);
    };
  }

  // A tensor that the kernels read.
  void read(const Tensor& x, const char* name) const {
    FASTATTN_CHECK(Device(x) == device, name, " must be on q's device");
    reachable(x, Access::kRead, name);
  }

 private:
  // Freed to torch's allocator when the call returns, for later work on the same stream.
  std::vector<Tensor> kept_;

  Integers integers(const Tensor& x, int64_t n, const char* name) {
    FASTATTN_CHECK(x.dim() == 1 && x.size(0) == n, name, " must have shape (", n, ",)");
    const bool wide = x.scalar_type() == ScalarType::Long;
    FASTATTN_CHECK(wide || x.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
    kept_.push_back(torch::stable::contiguous(x));
    read(kept_.back(), name);
    return {kept_.back().const_data_ptr(), wide};
  }

  const float* floats(const Tensor& x, const char* name) {
    kept_.push_back(torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)));
    read(kept_.back(), name);
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }

  void set_packed(const Tensor& q, const Tensor& k, const Shared& a) {
    FASTATTN_CHECK(a.cu_seqlens_k, "cu_seqlens_k must come with cu_seqlens_q");
    FASTATTN_CHECK(a.cu_seqlens_q->dim() == 1 && a.cu_seqlens_q->size(0) >= 1,
                   "cu_seqlens_q must have shape (B + 1,)");
    set_size(p.B, a.cu_seqlens_q->size(0) - 1, "batch");
    p.cu_q = integers(*a.cu_seqlens_q, int64_t(p.B) + 1, "cu_seqlens_q");
    p.cu_k = integers(*a.cu_seqlens_k, int64_t(p.B) + 1, "cu_seqlens_k");
    p.Tq = q.size(0), p.Tk = k.size(0);
    FASTATTN_CHECK(a.max_seqlen_q >= 0 && a.max_seqlen_k >= 0,
                   "max_seqlen_q and max_seqlen_k must not be negative, got ", a.max_seqlen_q,
                   " and ", a.max_seqlen_k);
    set_length(p.Sq, a.max_seqlen_q, "max_seqlen_q");
    set_length(p.Sk, a.max_seqlen_k, "max_seqlen_k");
  }
};

void check(const Launch& made, const AttentionParams& p, const char* op = "fwd") {
  check_launch(made, (std::string("attention_cuda_") + op).c_str(), "B ", p.B, " H ", p.H, " Sq ",
               p.Sq, " Sk ", p.Sk, " D ", p.D, " Dv ", p.Dv);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    Tensor q, Tensor k, Tensor v, Opt mask, Opt bias, Opt q_lens, Opt k_lens, Opt cu_seqlens_q,
    Opt cu_seqlens_k, Opt alibi_slopes, Opt sinks, Opt seed, double scale, int64_t causal,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p, int64_t weights,
    int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const OnDeviceOf on(q);
  Call call(
      q, k, v,
      {mask, bias, q_lens, k_lens, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, scale,
       causal, window_left, window_right, softcap, dropout_p, weights, max_seqlen_q, max_seqlen_k});
  AttentionParams& p = call.p;
  const auto make = call.allocator();
  Tensor o = empty_as(make, q, p.Dv);
  const Shape lse_shape = call.packed ? Shape{p.H, p.Tq} : Shape{p.B, p.H, p.Sq};
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor lse = empty(make, lse_shape, f32), lse_lo = empty(make, lse_shape, f32);
  Tensor w = empty(make, weights_shape(p), code_of(p.dtype));
  if (call.packed) {  // tokens of no sequence
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -INFINITY);
    torch::stable::zero_(lse_lo);
  }
  const Access rows = call.packed ? Access::kFilledResult : Access::kResult;
  reachable(o, rows, "o"), reachable(lse, rows, "lse"), reachable(lse_lo, rows, "lse_lo");
  reachable(w, Access::kResult, "weights");
  p.o = operand(o, call.packed);
  p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  p.lse_lo = static_cast<float*>(const_cast<void*>(lse_lo.const_data_ptr()));
  set_weights(p, w);
  if (lse.numel() > 0) check(fastattn::cuda::attention_forward(p, on.stream), p);
  if (w.numel() > 0) check(fastattn::cuda::attention_weights(p, on.stream), p);
  return {o, lse, lse_lo, w};
}

// ---- backward ----------------------------------------------------------------------------------

enum Need : int64_t { kDq = 1, kDk = 2, kDv = 4, kDbias = 8, kDsinks = 16 };

float* data(const Tensor& x) { return static_cast<float*>(const_cast<void*>(x.const_data_ptr())); }

// Upstream gradients and o, checked.
void set_upstream(Call& call, AttentionGrads& g, const Tensor& q, const Opt& d_o, const Opt& dlse,
                  const Opt& dweights, const Opt& o, bool needs_o) {
  AttentionParams& p = call.p;
  const auto rows_of_o = [&](const Tensor& x, const char* name) {
    FASTATTN_CHECK(x.dim() == q.dim() && x.size(0) == q.size(0) && x.size(1) == q.size(1) &&
                       x.size(-1) == p.Dv && x.scalar_type() == q.scalar_type() &&
                       (call.packed || x.size(2) == p.Sq),
                   name, " must have the shape and dtype of the forward's output");
    call.read(x, name);
    return operand(x, call.packed);
  };
  if (d_o) {
    g.d_o = rows_of_o(*d_o, "do");
    FASTATTN_CHECK(o.has_value() || !needs_o, "o must be given with do");
    if (o) p.o = rows_of_o(*o, "o");
  }
  if (dlse) {
    const int64_t dims = call.packed ? 2 : 3;
    FASTATTN_CHECK(dlse->dim() == dims && dlse->scalar_type() == ScalarType::Float &&
                       dlse->size(dims - 2) == p.H &&
                       dlse->size(dims - 1) == (call.packed ? p.Tq : int64_t(p.Sq)) &&
                       (call.packed || dlse->size(0) == p.B),
                   "dlse must have lse's shape and dtype");
    call.read(*dlse, "dlse");
    g.dlse = {const_cast<void*>(dlse->const_data_ptr()), call.packed ? 0 : dlse->stride(0),
              dlse->stride(dims - 2), dlse->stride(dims - 1), 0};
  }
  if (dweights && p.weights_mode != Weights::kNone) {
    const Tensor& w = *dweights;
    const bool mean = p.weights_mode == Weights::kMean;
    FASTATTN_CHECK(w.dim() == (mean ? 3 : 4) && w.size(0) == p.B && w.size(-2) == p.Sq &&
                       w.size(-1) == p.Sk && (mean || w.size(1) == p.H) &&
                       w.scalar_type() == q.scalar_type(),
                   "dweights must have the weights' shape and dtype");
    call.read(w, "dweights");
    g.dweights = {const_cast<void*>(w.const_data_ptr()), w.stride(0), mean ? 0 : w.stride(1),
                  w.stride(w.dim() - 2), w.stride(w.dim() - 1)};
    g.dweights_scale = mean ? 1.f / float(p.H) : 1.f;
  }
}

// Where the gradient of a bias is summed; the caller sums the result to the bias's shape.
template <class Make>
Tensor bias_buffer(const Make& make, const Tensor& bias, const AttentionParams& p,
                   AttentionGrads& g) {
  int64_t n[4] = {1, 1, 1, 1};
  for (int64_t d = 0; d < bias.dim(); ++d) n[4 - bias.dim() + d] = bias.size(d);
  FASTATTN_CHECK((n[0] == 1 || n[0] == p.B) && (n[1] == 1 || n[1] == p.H), "bias must have 1 or ",
                 p.B, " batch entries and 1 or ", p.H, " heads");
  const int64_t rows = n[2] == 1 ? p.Sq : n[2], keys = n[3] == 1 ? p.Sk : n[3];
  const int32_t f32 = aoti_torch_dtype_float32();
  Shape shape = {n[0], n[1], n[2], n[3]};
  int32_t dtype = g.dq_sums ? f32 : code_of(dtype_of(bias, "bias"));
  g.dbias_mode = BiasGrad::kShared;
  if ((n[3] == 1 && p.Sk > 1) || (n[2] == 1 && n[3] == 1)) {
    g.dbias_mode = BiasGrad::kRows, shape = {p.B, p.H, rows, 1}, dtype = f32;
  } else if (n[2] == 1 && p.Sq > 1) {
    g.dbias_mode = BiasGrad::kKeys, shape = {p.B, p.H, 1, keys}, dtype = f32;
  } else if (n[0] == p.B && n[1] == p.H) {
    g.dbias_mode = BiasGrad::kStore, dtype = code_of(dtype_of(bias, "bias"));
  }
  Tensor out = empty(make, shape, dtype);
  torch::stable::zero_(out);  // tiles that nobody sees, and where atomics begin
  g.dbias = const_cast<void*>(out.const_data_ptr());
  g.dbias_dtype = dtype_of(out, "dbias");
  int64_t* const strides[4] = {&g.dbias_b, &g.dbias_h, &g.dbias_i, &g.dbias_j};
  for (int d = 0; d < 4; ++d) *strides[d] = shape[size_t(d)] == 1 ? 0 : out.stride(d);
  g.bias_b = int(n[0]), g.bias_h = int(n[1]);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Opt d_o, Opt dlse, Opt dweights, Tensor q, Tensor k, Tensor v, Opt o, Tensor lse, Tensor lse_lo,
    Opt mask, Opt bias, Opt q_lens, Opt k_lens, Opt cu_seqlens_q, Opt cu_seqlens_k,
    Opt alibi_slopes, Opt sinks, Opt seed, double scale, int64_t causal, int64_t window_left,
    int64_t window_right, double softcap, double dropout_p, int64_t weights, int64_t max_seqlen_q,
    int64_t max_seqlen_k, bool deterministic, int64_t need) {
  const OnDeviceOf on(q);
  Call call(
      q, k, v,
      {mask, bias, q_lens, k_lens, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, scale,
       causal, window_left, window_right, softcap, dropout_p, weights, max_seqlen_q, max_seqlen_k});
  AttentionParams& p = call.p;
  AttentionGrads g;
  const Shape lse_shape = call.packed ? Shape{p.H, p.Tq} : Shape{p.B, p.H, p.Sq};
  for (const Tensor* x : {&lse, &lse_lo}) {
    bool same = x->dim() == int64_t(lse_shape.size());
    for (int64_t d = 0; same && d < x->dim(); ++d) same = x->size(d) == lse_shape[size_t(d)];
    FASTATTN_CHECK(same && x->is_contiguous() && x->scalar_type() == ScalarType::Float,
                   "lse and lse_lo must be the forward's");
    call.read(*x, x == &lse ? "lse" : "lse_lo");
  }
  p.lse = data(lse), p.lse_lo = data(lse_lo);
  set_upstream(call, g, q, d_o, dlse, dweights, o, need & ~kDv);

  const auto make = call.allocator();
  const int32_t f32 = aoti_torch_dtype_float32();
  const auto result = [&](const Tensor& like, bool wanted, Operand& to, const char* name) {
    if (!wanted) return empty(make, {0}, code_of(p.dtype));
    Tensor x = empty_as(make, like, like.size(-1));
    if (call.packed) torch::stable::zero_(x);  // tokens of no sequence
    reachable(x, call.packed ? Access::kFilledResult : Access::kResult, name);
    to = operand(x, call.packed);
    return x;
  };
  Tensor dq = result(q, need & kDq, g.dq, "dq"), dk = result(k, need & kDk, g.dk, "dk"),
         dv = result(v, need & kDv, g.dv, "dv");
  Tensor delta = empty(make, lse_shape, f32), lse_units = empty(make, lse_shape, f32);
  if (call.packed) torch::stable::fill_(lse_units, INFINITY);
  reachable(delta, Access::kResult, "delta");
  reachable(lse_units, call.packed ? Access::kFilledResult : Access::kResult, "lse_units");
  g.delta = data(delta), g.lse_units = data(lse_units);
  Tensor sums = empty(make, {0}, f32);
  if (!deterministic && (need & kDq) && (need & (kDk | kDv))) {
    Shape shape = lse_shape;
    shape.push_back(p.D);
    sums = empty(make, shape, f32);
    torch::stable::zero_(sums);
    reachable(sums, Access::kFilledResult, "dq_sums");
    g.dq_sums = data(sums);
  }
  Tensor dbias = empty(make, {0}, code_of(p.dtype)), dsinks = empty(make, {0}, code_of(p.dtype));
  if ((need & kDbias) && bias) {
    dbias = bias_buffer(make, *bias, p, g);
    reachable(dbias, Access::kFilledResult, "dbias");
  }
  if ((need & kDsinks) && sinks) {
    dsinks = empty(make, {p.H}, f32);
    reachable(dsinks, Access::kResult, "dsinks");
    g.dsinks = data(dsinks);
  }
  check(fastattn::cuda::attention_backward(p, g, on.stream), p, "bwd");
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, FASTATTN_GPU_KEY, m) {
  m.impl("attention_cuda_kernel_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_cuda_kernel_bwd", TORCH_BOX(&attention_bwd));
}
