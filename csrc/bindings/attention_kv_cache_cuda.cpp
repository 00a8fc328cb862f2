// torch.ops.fastattn.attention_kv_cache_cuda_kernel: attention over a KV cache by the CUDA C++
// kernels. Checks, allocation, launch. Stable ABI only. Nothing is read back from the device and
// nothing waits for it; what lies there is clamped where it is read.
//
// The public op, attention_kv_cache_cuda, is Python (fastattn/ops/attention_kv_cache_cuda.py): it
// looks at the first-use verdict, below the compilers, and then calls this one.

#include "../cuda/attention_kv_cache.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_kv_cache_args.h"
#include "device.h"
#include "stand_in.h"

namespace {

using fastattn::cuda::AttentionKVCacheParams;
using fastattn::cuda::AttentionKVCachePlan;
using fastattn::cuda::AttentionParams;
using fastattn::cuda::Integers;
using fastattn::cuda::KVCache;
using namespace fastattn::binding;

constexpr const char* kOp = "attention_kv_cache_cuda";

// The parameters of the launches, and what keeps their pointers alive until they are made.
struct Call {
  AttentionKVCacheParams p;
  AttentionParams& a = p.attention;
  KVCache& cache = p.cache;
  Device device;

  explicit Call(const CacheArguments& given) : device(given.q) {
    set_caches(a, given);
    using fastattn::cuda::kMaxHeadDim;
    FASTATTN_CHECK(a.D <= kMaxHeadDim && a.Dv <= kMaxHeadDim,
                   "the CUDA kernels take head_dim up to ", kMaxHeadDim, ", got ", a.D, " and ",
                   a.Dv);
    a.q = operand(given.q, false);
    read(given.q, "q");
    set_new_rows(given);
    set_where(given);
    check_lengths(a, given, cache.Sn);
    cache.cache_lens = integers(given.cache_lens, "cache_lens");
    if (given.new_lens) cache.new_lens = integers(*given.new_lens, "new_lens");
    set_rotary(given);
    set_cache_features(a, given);
    if (given.mask) read(*given.mask, "mask");
    if (given.alibi_slopes) a.alibi = floats(*given.alibi_slopes, "alibi_slopes");
    if (given.sinks) a.sinks = floats(*given.sinks, "sinks");
  }
  Call(const Call&) = delete;

  auto allocator() const {
    return [device = device](const Shape& shape, const Shape& strides, int32_t dtype) {
      return empty_on(device, shape, strides, dtype);
    };
  }

 private:
  // Freed to torch's allocator when the call returns, for later work on the same stream.
  std::vector<Tensor> kept_;

  void on_device(const Tensor& x, const char* name) const {
    FASTATTN_CHECK(Device(x) == device, name, " must be on q's device");
  }
  // A tensor that the kernels read.
  const void* read(const Tensor& x, const char* name) const {
    on_device(x, name);
    reachable(x, Access::kRead, name);
    return x.const_data_ptr();
  }
  Integers integers(const Tensor& x, const char* name) {
    kept_.push_back(torch::stable::contiguous(x));
    return {read(kept_.back(), name), x.scalar_type() == ScalarType::Long};
  }
  const float* floats(const Tensor& x, const char* name) {
    kept_.push_back(torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)));
    return static_cast<const float*>(read(kept_.back(), name));
  }

  void set_new_rows(const CacheArguments& given) {
    set_size(cache.Sn, new_rows(a, given), "length");
    // The caches are written where there is something to append, and read in any case.
    const Access access = cache.Sn > 0 ? Access::kFilledResult : Access::kRead;
    on_device(given.k_cache, "k_cache"), on_device(given.v_cache, "v_cache");
    reachable(given.k_cache, access, "k_cache"), reachable(given.v_cache, access, "v_cache");
    if (!given.k) return;
    cache.k = operand(*given.k, false), cache.v = operand(*given.v, false);
    read(*given.k, "k"), read(*given.v, "v");
  }

  // Sk becomes the capacity.
  void set_where(const CacheArguments& given) {
    check_where(a, given);
    set_size(cache.entries, given.k_cache.size(0), "entries");
    int64_t capacity = a.Sk;
    if (given.block_table) {
      cache.page_size = a.Sk;
      set_size(cache.columns, given.block_table->size(1), "columns of block_table");
      cache.table = integers(*given.block_table, "block_table");
      capacity *= cache.columns;
    } else if (given.cache_index) {
      cache.index = integers(*given.cache_index, "cache_index");
    }
    FASTATTN_CHECK(a.Sq + capacity < 1 << 30, "Sq and the capacity must be less than 2^30, got ",
                   a.Sq + capacity);
    a.Sk = cache.entries > 0 ? int(capacity) : 0;
  }

  void set_rotary(const CacheArguments& given) {
    const int64_t half = rotary_half(a, given);
    if (half == 0) return;
    set_size(cache.positions, given.cos->size(0), "positions");
    // A table without rows can only be asked for rows that are not there.
    if (cache.positions == 0) return;
    cache.half = int(half), cache.interleaved = given.interleaved;
    cache.cos = static_cast<const float*>(read(*given.cos, "cos"));
    cache.sin = static_cast<const float*>(read(*given.sin, "sin"));
  }
};

std::tuple<Tensor, Tensor> attention_kv_cache(Tensor q, Tensor k_cache, Tensor v_cache,
                                              Tensor cache_lens, Opt k, Opt v, Opt new_lens,
                                              Opt block_table, Opt cache_index, Opt cos, Opt sin,
                                              Opt mask, Opt alibi_slopes, Opt sinks, double scale,
                                              double softcap, bool causal, int64_t window_left,
                                              int64_t window_right, bool interleaved) {
  const OnDeviceOf on(q);
  Call call({q,       k_cache,  v_cache,      cache_lens,   k,
             v,       new_lens, block_table,  cache_index,  cos,
             sin,     mask,     alibi_slopes, sinks,        scale,
             softcap, causal,   window_left,  window_right, interleaved});
  AttentionParams& a = call.a;
  const auto make = call.allocator();
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor o = empty_as(make, q, a.Dv), lse = empty(make, {a.B, a.H, a.Sq}, f32);
  reachable(o, Access::kResult, "o"), reachable(lse, Access::kResult, "lse");
  a.o = unit(o);
  a.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  const AttentionKVCachePlan plan =
      fastattn::cuda::attention_kv_cache_plan(call.p, multiprocessors(device_index(q), kOp));
  Tensor scratch = empty(make, {plan.scratch}, f32);
  reachable(scratch, Access::kResult, "scratch");
  float* const parts = static_cast<float*>(const_cast<void*>(scratch.const_data_ptr()));
  check_launch(fastattn::cuda::attention_kv_cache(call.p, plan, parts, on.stream), kOp, "B ", a.B,
               " H ", a.H, " Sq ", a.Sq, " capacity ", a.Sk, " D ", a.D, " Dv ", a.Dv, " splits ",
               plan.splits);
  return {o, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, FASTATTN_GPU_KEY, m) {
  m.impl("attention_kv_cache_cuda_kernel", TORCH_BOX(&attention_kv_cache));
}
