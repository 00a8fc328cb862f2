// torch.ops.fastattn.layernorm_ffn_cuda_kernel_{fwd,bwd}: the CUDA C++ kernels. Checks, allocation,
// launch. Stable ABI only. Nothing is read back from the device and nothing waits for it.
//
// The public ops, layernorm_ffn_cuda_{fwd,bwd}, are Python (fastattn/ops/layernorm_ffn_cuda.py):
// they look at the first-use verdict, below the compilers, and then call these.

#include "../cuda/layernorm_ffn.h"

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
using fastattn::cuda::Act;
using fastattn::cuda::kMaxFfnWidth;
using fastattn::cuda::Launch;
using fastattn::cuda::LayerNormFfnGrads;
using fastattn::cuda::LayerNormFfnParams;
using fastattn::cuda::Matrix;
using fastattn::cuda::Norm;
using fastattn::cuda::Parameter;

constexpr const char* kOp = "layernorm_ffn_cuda";
#define FASTATTN_FFN_CHECK(cond, ...) STD_TORCH_CHECK(cond, "fastattn::", kOp, ": ", __VA_ARGS__)

enum Save : int64_t { kSaveStats = 1 };

struct Inputs {  // of both directions, in schema order
  Tensor x, w1;
  Opt b1;
  Tensor w2;
  Opt b2, w_gate, b_gate, norm_weight, norm_bias, seed;
};

struct Numbers {
  int64_t norm;
  double eps;
  int64_t act;
  bool pre_norm, residual;
  double dropout_p, hidden_dropout_p;
};

// The parameters of the launches, checked, and what keeps their pointers alive until they are made.
struct Call {
  LayerNormFfnParams p;
  Device device;
  DType x_dtype;
  Shape x_shape, y_shape;

  Call(const Inputs& in, const Numbers& n) : device(in.x) {
    set_weights(in);
    set_numbers(n);
    set_x(in.x);
    p.b1 = parameter(in.b1, p.F, "b1"), p.b2 = parameter(in.b2, p.Dout, "b2");
    FASTATTN_FFN_CHECK(!in.b_gate || in.w_gate, "b_gate needs w_gate");
    p.b_gate = parameter(in.b_gate, p.F, "b_gate");
    const int normed = p.pre_norm ? p.D : p.Dout;
    p.norm_weight = parameter(in.norm_weight, normed, "norm_weight");
    p.shift = parameter(in.norm_bias, normed, "norm_bias");
    if (n.dropout_p > 0. || n.hidden_dropout_p > 0.) {
      FASTATTN_FFN_CHECK(
          in.seed && in.seed->scalar_type() == ScalarType::Long && in.seed->numel() == 1,
          "dropout needs seed, a 1-element int64 tensor");
      p.seed = static_cast<const int64_t*>(read(*in.seed, "seed"));
    }
  }

  Tensor empty(const Shape& shape, DType dtype) const {
    Shape strides(shape.size(), 1);
    for (size_t d = shape.size(); d-- > 1;)
      strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
    return empty_on(device, shape, strides, dtype_code(dtype));
  }
  // A result or scratch of the kernels.
  Tensor result(const Shape& shape, DType dtype, const char* name) const {
    Tensor x = empty(shape, dtype);
    reachable(x, Access::kResult, name);
    return x;
  }
  // What is saved and given back: contiguous, of that many elements; null where there are none.
  float* saved(const Tensor& x, int64_t elements, const char* name) {
    FASTATTN_FFN_CHECK(
        x.numel() == elements && x.is_contiguous() && row_dtype(kOp, x, name) == DType::kF32, name,
        " must be the forward's");
    return static_cast<float*>(const_cast<void*>(read(x, name)));
  }
  // Rows of N columns on the same device.
  Matrix rows(const Tensor& x, int64_t N, const char* name) {
    const RowView view(kOp, x, N, name);
    kept_.push_back(view.tensor());
    read(kept_.back(), name);
    return {view.rows().ptr, view.rows().dtype, view.rows().stride};
  }
  Matrix contiguous_rows(const Tensor& x, int N) const {
    return {x.numel() ? data(x) : nullptr, x_dtype, N};
  }

  int multiprocessors() const { return fastattn::binding::multiprocessors(device_index_, kOp); }

  void check(const Launch& made, const char* way) const {
    check_launch(made, (std::string(kOp) + "_" + way).c_str(), "M ", p.M, " D ", p.D, " F ", p.F,
                 " Dout ", p.Dout);
  }

  // A tensor that the kernels read.
  const void* read(const Tensor& x, const char* name) const {
    FASTATTN_FFN_CHECK(Device(x) == device, name, " must be on x's device");
    reachable(x, Access::kRead, name);
    return x.const_data_ptr();
  }

 private:
  // Freed to torch's allocator when the call returns, for later work on the same stream.
  std::vector<Tensor> kept_;
  int device_index_ = 0;

  static int size(int64_t n, const char* name) {
    FASTATTN_FFN_CHECK(n > 0 && n < std::numeric_limits<int>::max() / 2, name,
                       " must be positive and below 2^30, got ", n);
    return int(n);
  }

  Matrix weight(const Tensor& w, const char* name) {
    FASTATTN_FFN_CHECK(w.dim() == 2, name, " must have shape (out, in), got ", text(w));
    Tensor x = w;
    // Kernels read rows; a weight stored by columns (nn.Linear of a transposed view) is copied.
    if (x.size(1) != 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
    kept_.push_back(x);
    read(x, name);
    return {data(x), row_dtype(kOp, x, name), x.stride(0)};
  }

  void set_weights(const Inputs& in) {
    device_index_ = device_index(in.x);
    p.w1 = weight(in.w1, "w1"), p.w2 = weight(in.w2, "w2");
    p.F = size(in.w1.size(0), "F"), p.D = size(in.w1.size(1), "D");
    p.Dout = size(in.w2.size(0), "Dout"), p.dtype = p.w1.dtype;
    FASTATTN_FFN_CHECK(in.w2.size(1) == p.F, "w2 must have ", p.F, " columns to match w1 ",
                       text(in.w1), ", got ", text(in.w2));
    FASTATTN_FFN_CHECK(p.D <= kMaxFfnWidth && p.Dout <= kMaxFfnWidth,
                       "the CUDA kernels take up to ", kMaxFfnWidth, " columns, got ", p.D, " and ",
                       p.Dout);
    FASTATTN_FFN_CHECK(p.w2.dtype == p.dtype, "w1 and w2 must have one dtype");
    if (!in.w_gate) return;
    p.w_gate = weight(*in.w_gate, "w_gate");
    FASTATTN_FFN_CHECK(shape_of(*in.w_gate) == shape_of(in.w1) && p.w_gate.dtype == p.dtype,
                       "w_gate must have w1's shape ", text(in.w1), " and dtype, got ",
                       text(*in.w_gate));
  }

  void set_numbers(const Numbers& n) {
    FASTATTN_FFN_CHECK(n.norm >= 0 && n.norm <= 2 && n.act >= 0 && n.act <= 4,
                       "norm or act out of range");
    for (const double probability : {n.dropout_p, n.hidden_dropout_p})
      FASTATTN_FFN_CHECK(probability >= 0. && probability < 1., "dropout must be in [0, 1), got ",
                         probability);
    p.norm = Norm(n.norm), p.eps = float(n.eps), p.act = Act(n.act);
    p.pre_norm = n.pre_norm, p.residual = n.residual;
    p.dropout_p = n.dropout_p, p.hidden_dropout_p = n.hidden_dropout_p;
  }

  void set_x(const Tensor& x) {
    FASTATTN_FFN_CHECK(x.dim() > 0 && x.size(-1) == p.D, "x must have ", p.D,
                       " columns to match w1, got ", text(x));
    FASTATTN_FFN_CHECK(!p.residual || p.Dout == p.D, "the residual needs w2 with ", p.D,
                       " rows to match x ", text(x), ", got ", p.Dout);
    p.x = rows(x, p.D, "x"), p.M = x.numel() / p.D;
    x_dtype = p.x.dtype;
    FASTATTN_FFN_CHECK(x_dtype == p.dtype || x_dtype == DType::kF32,
                       "x must be float32 or have w1's dtype");
    x_shape = y_shape = shape_of(x);
    y_shape.back() = p.Dout;
  }

  Parameter parameter(const Opt& x, int n, const char* name) {
    if (!x) return {};
    FASTATTN_FFN_CHECK(x->numel() == n, name, " must have ", n, " elements, got shape ", text(*x));
    // The kernels read the three float dtypes; others (fp64) are small and converted.
    const bool known = x->scalar_type() != ScalarType::Double;
    kept_.push_back(
        torch::stable::contiguous(known ? *x : torch::stable::to(*x, ScalarType::Float)));
    read(kept_.back(), name);
    return {kept_.back().const_data_ptr(), row_dtype(kOp, kept_.back(), name)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_ffn_fwd(
    Tensor x, Tensor w1, Opt b1, Tensor w2, Opt b2, Opt w_gate, Opt b_gate, Opt norm_weight,
    Opt norm_bias, Opt seed, int64_t norm, double eps, int64_t act, bool pre_norm, bool residual,
    double dropout_p, double hidden_dropout_p, int64_t save) {
  const OnDeviceOf on(x);
  Call call({x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed},
            {norm, eps, act, pre_norm, residual, dropout_p, hidden_dropout_p});
  FASTATTN_FFN_CHECK((save & ~kSaveStats) == 0,
                     "the CUDA kernels save nothing of the hidden layer (recompute=\"all\")");
  LayerNormFfnParams& p = call.p;
  const bool stats = save & kSaveStats;
  Tensor y = call.result(call.y_shape, call.x_dtype, "y");
  const bool keeps_s = stats && p.norm != Norm::kNone && !p.pre_norm;
  Tensor s = call.result(keeps_s ? call.y_shape : Shape{0}, call.x_dtype, "s");
  Tensor mean = call.result({stats && p.norm == Norm::kLayer ? p.M : 0}, DType::kF32, "mean");
  Tensor rstd = call.result({stats && p.norm != Norm::kNone ? p.M : 0}, DType::kF32, "rstd");
  p.y = call.contiguous_rows(y, p.Dout), p.s = call.contiguous_rows(s, p.Dout);
  p.mean = floats(mean), p.rstd = floats(rstd);
  p.splits = fastattn::cuda::layernorm_ffn_splits(p, call.multiprocessors());
  Tensor partials = call.result(
      {p.splits > 1 ? p.splits * p.M * fastattn::cuda::layernorm_ffn_stride(p.Dout) : 0},
      DType::kF32, "partials");
  p.partials = floats(partials);
  call.check(fastattn::cuda::layernorm_ffn_forward(p, on.stream), "fwd");
  const auto none = [&] { return call.empty({0}, p.dtype); };
  return {y, s, mean, rstd, none(), none(), none()};
}

// ---- backward ----------------------------------------------------------------------------------

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
layernorm_ffn_bwd(Tensor dy, Tensor x, Tensor w1, Opt b1, Tensor w2, Opt b2, Opt w_gate, Opt b_gate,
                  Opt norm_weight, Opt norm_bias, Opt seed, Tensor s, Tensor mean, Tensor rstd,
                  int64_t norm, double eps, int64_t act, bool pre_norm, bool residual,
                  double dropout_p, double hidden_dropout_p, int64_t need) {
  const OnDeviceOf on(x);
  Call call({x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed},
            {norm, eps, act, pre_norm, residual, dropout_p, hidden_dropout_p});
  LayerNormFfnParams& p = call.p;
  FASTATTN_FFN_CHECK(shape_of(dy) == call.y_shape && dy.scalar_type() == x.scalar_type(),
                     "dy must have the output's shape and dtype, got ", text(dy));
  p.mean = call.saved(mean, p.norm == Norm::kLayer ? p.M : 0, "mean");
  p.rstd = call.saved(rstd, p.norm != Norm::kNone ? p.M : 0, "rstd");
  if (p.norm != Norm::kNone && !p.pre_norm) {
    FASTATTN_FFN_CHECK(shape_of(s) == call.y_shape && s.scalar_type() == x.scalar_type(),
                       "s must be the forward's");
    p.s = call.rows(s, p.Dout, "s");
  }
  LayerNormFfnGrads g;
  g.dy = call.rows(dy, p.Dout, "dy");
  const auto wanted = [&](bool given, const Shape& shape, DType dtype, const char* name) {
    return call.result(given ? shape : Shape{0}, dtype, name);
  };
  const int normed = p.pre_norm ? p.D : p.Dout;
  Tensor dx = wanted(need & kDx, call.x_shape, call.x_dtype, "dx");
  Tensor dw1 = wanted(need & kDw1, {p.F, p.D}, p.dtype, "dw1");
  Tensor dw2 = wanted(need & kDw2, {p.Dout, p.F}, p.dtype, "dw2");
  Tensor dw_gate = wanted((need & kDwGate) && w_gate, {p.F, p.D}, p.dtype, "dw_gate");
  const auto sum = [&](bool given, int n, const char* name) {
    return wanted(given, {n}, DType::kF32, name);
  };
  Tensor db1 = sum((need & kDb1) && b1, p.F, "db1"), db2 = sum((need & kDb2) && b2, p.Dout, "db2");
  Tensor db_gate = sum((need & kDbGate) && b_gate, p.F, "db_gate");
  Tensor dnorm_weight = sum((need & kDnormWeight) && norm_weight, normed, "dnorm_weight");
  Tensor dnorm_bias = sum((need & kDnormBias) && norm_bias, normed, "dnorm_bias");
  const auto pointer = [](const Tensor& t) { return t.numel() ? data(t) : nullptr; };
  g.dx = call.contiguous_rows(dx, p.D);
  g.dw1 = pointer(dw1), g.dw2 = pointer(dw2), g.dw_gate = pointer(dw_gate);
  g.db1 = floats(db1), g.db2 = floats(db2), g.db_gate = floats(db_gate);
  g.dnorm_weight = floats(dnorm_weight), g.dshift = floats(dnorm_bias);
  g.chunks = fastattn::cuda::layernorm_ffn_chunks(p, g, call.multiprocessors());
  const auto size = fastattn::cuda::layernorm_ffn_scratch(p, g);
  Tensor xn = call.result({size.xn}, p.dtype, "xn"), dz = call.result({size.dz}, p.dtype, "dz");
  Tensor row_sums = call.result({size.row_sums}, DType::kF32, "row_sums");
  Tensor weight_sums = call.result({size.weight_sums}, DType::kF32, "weight_sums");
  g.xn = pointer(xn), g.dz = pointer(dz);
  g.row_sums = floats(row_sums), g.weight_sums = floats(weight_sums);
  call.check(fastattn::cuda::layernorm_ffn_backward(p, g, on.stream), "bwd");
  return {dx, dw1, db1, dw2, db2, dw_gate, db_gate, dnorm_weight, dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, FASTATTN_GPU_KEY, m) {
  m.impl("layernorm_ffn_cuda_kernel_fwd", TORCH_BOX(&layernorm_ffn_fwd));
  m.impl("layernorm_ffn_cuda_kernel_bwd", TORCH_BOX(&layernorm_ffn_bwd));
}
