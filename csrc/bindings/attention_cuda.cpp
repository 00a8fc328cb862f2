// torch.ops.fastattn.attention_cuda_kernel_fwd: the CUDA C++ kernels. Checks, allocation, launch.
// Stable ABI only. Nothing is read back from the device and nothing waits for it.
//
// The public op, attention_cuda_fwd, is Python (fastattn/ops/attention_cuda.py): it looks at the
// first-use verdict, below the compilers, and then calls this one.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../cuda/attention.h"
#include "attention_args.h"
#include "stand_in.h"

namespace {

using fastattn::Weights;
using fastattn::cuda::AttentionParams;
using fastattn::cuda::Integers;
using fastattn::cuda::Launch;
using namespace fastattn::binding;

struct Device {
  explicit Device(const Tensor& x) : index(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  int32_t type = 0, index = 0;
};

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
      AtenTensorHandle handle = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                             strides.data(), dtype, device.type,
                                                             device.index, &handle));
      return Tensor(handle);
    };
  }

 private:
  // Freed to torch's allocator when the call returns, for later work on the same stream.
  std::vector<Tensor> kept_;

  void read(const Tensor& x, const char* name) {
    FASTATTN_CHECK(Device(x) == device, name, " must be on q's device");
    reachable(x, Access::kRead, name);
  }

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
    set_size(p.Sq, a.max_seqlen_q, "max_seqlen_q"), set_size(p.Sk, a.max_seqlen_k, "max_seqlen_k");
  }
};

void check(const Launch& made, const AttentionParams& p) {
  if (made.error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would report this one's
  STD_TORCH_CHECK(false, "fastattn::attention_cuda_fwd: ", cudaGetErrorName(made.error), " (",
                  cudaGetErrorString(made.error), ") from ", made.kernel, ", grid ", made.grid,
                  ", block ", made.block, ", ", made.shared, " bytes of shared memory, B ", p.B,
                  " H ", p.H, " Sq ", p.Sq, " Sk ", p.Sk, " D ", p.D, " Dv ", p.Dv);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, FASTATTN_GPU_KEY, m) {
  m.impl("attention_cuda_kernel_fwd", TORCH_BOX(&attention_fwd));
}
