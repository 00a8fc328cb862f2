// What the bindings of attention over a KV cache share on every device: the arguments, and their
// shapes and dtypes checked so that no launch leaves its tensors. Values (lengths, pages) are not
// looked at here: on a device they cannot be.
#pragma once

#include "attention_args.h"

#undef FASTATTN_CHECK
#define FASTATTN_CHECK(cond, ...) \
  STD_TORCH_CHECK(cond, "fastattn::attention_with_kv_cache: ", __VA_ARGS__)

namespace fastattn::binding {

// In the order of the schema; see fastattn/ops/attention_kv_cache_op.py.
struct CacheArguments {
  const Tensor &q, &k_cache, &v_cache, &cache_lens;
  const Opt &k, &v, &new_lens, &block_table, &cache_index, &cos, &sin, &mask, &alibi_slopes, &sinks;
  double scale, softcap;
  bool causal;
  int64_t window_left, window_right;
  bool interleaved;
};

// Two elements of a tensor that is written may not share memory.
inline bool overlaps(const Tensor& x) {
  int64_t order[4] = {0, 1, 2, 3}, reach = 0;
  std::sort(order, order + 4, [&](int64_t a, int64_t b) { return x.stride(a) < x.stride(b); });
  for (const int64_t d : order) {
    if (x.size(d) <= 1) continue;
    if (x.stride(d) <= reach) return true;
    reach += x.stride(d) * (x.size(d) - 1);
  }
  return false;
}

inline bool is_float(const Tensor& x) {
  const ScalarType t = x.scalar_type();
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half ||
         t == ScalarType::BFloat16;
}

// An operand whose columns are neighbours.
inline Operand unit(const Tensor& x) {
  Operand o = operand(x, false);
  o.d = 1;  // of one column, any
  return o;
}

// Sizes and dtype of a call, and the caches as operands; Sk is that of the tensors.
template <class Params>
void set_caches(Params& a, const CacheArguments& given) {
  const Tensor &q = given.q, &k_cache = given.k_cache, &v_cache = given.v_cache;
  for (const Tensor* x : {&q, &k_cache, &v_cache}) {
    FASTATTN_CHECK(x->dim() == 4, "q and the caches must have 4 dimensions, got ", x->dim());
    FASTATTN_CHECK(x->scalar_type() == q.scalar_type(), "q and the caches must have one dtype");
  }
  a.dtype = dtype_of(q, "q");
  FASTATTN_CHECK(a.dtype != DType::kBool, "q must be float32, bfloat16 or float16");
  set_size(a.B, q.size(0), "batch"), set_size(a.H, q.size(1), "heads");
  set_size(a.Sq, q.size(2), "length"), set_size(a.D, q.size(3), "head_dim");
  set_size(a.Hk, k_cache.size(1), "heads"), set_size(a.Sk, k_cache.size(2), "length");
  set_size(a.Dv, v_cache.size(3), "head_dim");
  FASTATTN_CHECK(a.Sq > 0, "q must have at least one row a sequence");
  FASTATTN_CHECK(a.D > 0 && a.Dv > 0, "head_dim must be at least 1");
  FASTATTN_CHECK(k_cache.size(3) == a.D, "k_cache must have q's head_dim ", a.D);
  FASTATTN_CHECK(
      v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == a.Hk && v_cache.size(2) == a.Sk,
      "v_cache must have k_cache's first dimensions");
  FASTATTN_CHECK(a.Hk > 0 && a.H % a.Hk == 0, "q's heads must be a multiple of the cache's, got ",
                 a.H, " and ", a.Hk);
  for (const Tensor* x : {&k_cache, &v_cache})
    FASTATTN_CHECK(x->stride(3) == 1 || x->size(3) == 1, "the caches must have stride 1 in d");
  a.k = unit(k_cache), a.v = unit(v_cache);
}

// How many new rows there are.
template <class Params>
int64_t new_rows(const Params& a, const CacheArguments& given) {
  FASTATTN_CHECK(given.k.has_value() == given.v.has_value(), "k and v must be given together");
  if (!given.k) return 0;
  const Tensor &k = *given.k, &v = *given.v;
  for (const Tensor* x : {&k, &v})
    FASTATTN_CHECK(x->dim() == 4 && x->scalar_type() == given.q.scalar_type() &&
                       x->size(0) == a.B && x->size(1) == a.Hk && x->size(2) == k.size(2),
                   "k and v must be (B, Hk, Sn, ...) of q's dtype");
  FASTATTN_CHECK(k.size(3) == a.D && v.size(3) == a.Dv, "k and v must have the caches' head_dims");
  if (k.numel() + v.numel() > 0) {
    FASTATTN_CHECK(!overlaps(given.k_cache) && !overlaps(given.v_cache),
                   "no two elements of a cache may share memory");
    FASTATTN_CHECK(given.k_cache.const_data_ptr() != given.v_cache.const_data_ptr() ||
                       given.k_cache.numel() == 0,
                   "v_cache must not be k_cache: both are written");
  }
  return k.size(2);
}

inline void check_indices(const Tensor& x, int64_t dims, int64_t rows, const char* name) {
  FASTATTN_CHECK(x.dim() == dims && x.size(0) == rows, name, " must have ", dims,
                 " dimensions, the first of them ", rows);
  FASTATTN_CHECK(x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int, name,
                 " must be int32 or int64");
}

template <class Params>
void check_where(const Params& a, const CacheArguments& given) {
  const int64_t entries = given.k_cache.size(0);
  if (given.block_table) {
    FASTATTN_CHECK(!given.cache_index, "cache_index does not go with block_table");
    FASTATTN_CHECK(a.Sk > 0, "a page must have at least one slot");
    check_indices(*given.block_table, 2, a.B, "block_table");
  } else if (given.cache_index) {
    check_indices(*given.cache_index, 1, a.B, "cache_index");
  } else {
    FASTATTN_CHECK(entries == a.B, "the cache has ", entries, " entries for ", a.B, " sequences");
  }
}

// sn: new rows.
template <class Params>
void check_lengths(const Params& a, const CacheArguments& given, int64_t sn) {
  check_indices(given.cache_lens, 1, a.B, "cache_lens");
  if (!given.new_lens) return;
  FASTATTN_CHECK(given.k && sn == a.Sq, "new_lens needs k and v of as many rows as q");
  check_indices(*given.new_lens, 1, a.B, "new_lens");
}

// How many pairs of dims turn; 0 = none.
template <class Params>
int64_t rotary_half(const Params& a, const CacheArguments& given) {
  FASTATTN_CHECK(given.cos.has_value() == given.sin.has_value(),
                 "cos and sin must be given together");
  if (!given.cos) return 0;
  const Tensor& cos = *given.cos;
  for (const Tensor* x : {&cos, &*given.sin})
    FASTATTN_CHECK(x->dim() == 2 && x->scalar_type() == ScalarType::Float && x->is_contiguous() &&
                       x->size(0) == cos.size(0) && x->size(1) == cos.size(1),
                   "cos and sin must be contiguous float32 of one shape (positions, R / 2)");
  FASTATTN_CHECK(cos.size(1) >= 1 && 2 * cos.size(1) <= a.D, "rotary must have R <= head_dim ",
                 a.D);
  return cos.size(1);
}

// The mask, what alibi_slopes and sinks must be, and the numbers, once Sk is the capacity.
template <class Params>
void set_cache_features(Params& a, const CacheArguments& given) {
  if (given.mask) {
    FASTATTN_CHECK(given.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    const int64_t limits[4] = {a.B, a.H, a.Sq, a.Sk};
    a.mask = broadcast(*given.mask, limits, "mask");
    const int64_t dims = given.mask->dim();
    for (int64_t d = 0; d < dims; ++d)  // the ops of attention take more than is read
      FASTATTN_CHECK(given.mask->size(d) == 1 || given.mask->size(d) == limits[4 - dims + d],
                     "mask must broadcast to (B, H, Sq, capacity)");
  }
  if (given.alibi_slopes) {
    const Tensor& slopes = *given.alibi_slopes;
    const int64_t dims = slopes.dim();
    const bool two = dims == 2;
    FASTATTN_CHECK(is_float(slopes) && (dims == 1 || two) && slopes.size(dims - 1) == a.H &&
                       (!two || slopes.size(0) == a.B),
                   "alibi_slopes must be floats of shape (H,) or (B, H)");
    a.alibi_b = two ? a.H : 0;
  }
  if (given.sinks)
    FASTATTN_CHECK(is_float(*given.sinks) && given.sinks->dim() == 1 && given.sinks->size(0) == a.H,
                   "sinks must be floats of shape (H,)");
  a.scale = float(given.scale), a.softcap = float(given.softcap);
  a.causal = given.causal ? Causal::kBottomRight : Causal::kNone;
  const int64_t furthest = int64_t(a.Sq) + a.Sk;  // further is no further
  set_size(a.window_left, std::min(given.window_left, furthest), "Sq + Sk");
  set_size(a.window_right, std::min(given.window_right, furthest), "Sq + Sk");
}

}  // namespace fastattn::binding
