// The arguments of attention over a KV cache, checked, values too, for the CPU's kernel. Stable ABI
// only. The Python layer words a refusal for the caller.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../cpu/attention_kv_cache.h"
#include "attention_args.h"
#include "cpu.h"

#define FASTATTN_KV_CHECK(cond, ...) \
  STD_TORCH_CHECK(cond, "fastattn::attention_with_kv_cache: ", __VA_ARGS__)

namespace fastattn::binding {

inline Indices indices(const Tensor& x, int64_t dims, int64_t rows, const char* name) {
  FASTATTN_KV_CHECK(x.dim() == dims && x.size(0) == rows, name, " must have ", dims,
                    " dimensions, the first of them ", rows);
  const bool wide = x.scalar_type() == ScalarType::Long;
  FASTATTN_KV_CHECK(wide || x.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  return {x.const_data_ptr(), wide, x.stride(0), dims > 1 ? x.stride(1) : 0};
}

inline bool is_float(const Tensor& x) {
  const ScalarType t = x.scalar_type();
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half ||
         t == ScalarType::BFloat16;
}

inline std::vector<float> float_values(const Tensor& x) {
  const Tensor f = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  const float* p = static_cast<const float*>(f.const_data_ptr());
  return std::vector<float>(p, p + f.numel());
}

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

// The rows are read with unit stride in d.
inline Tensor readable(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

inline Operand unit(const Tensor& x) {
  Operand o = operand(x, false);
  o.d = 1;  // of one column, any
  return o;
}

struct KVCacheCall {
  AttentionKVCacheParams p;
  AttentionParams& a = p.attention;
  Tensor q;
  Opt k, v;
  int64_t entries = 0;
  std::vector<int64_t> cache_len, new_len;
  std::vector<float> alibi, sinks;

  KVCacheCall(const Tensor& given_q, const Tensor& k_cache, const Tensor& v_cache) : q(given_q) {
    for (const Tensor* x : {&given_q, &k_cache, &v_cache}) {
      FASTATTN_KV_CHECK(x->dim() == 4, "q and the caches must have 4 dimensions, got ", x->dim());
      FASTATTN_KV_CHECK(x->scalar_type() == q.scalar_type(),
                        "q and the caches must have one dtype");
    }
    a.dtype = dtype_of(q, "q");
    FASTATTN_KV_CHECK(a.dtype != DType::kBool, "q must be float32, bfloat16 or float16");
    a.B = q.size(0), a.H = q.size(1), a.Sq = q.size(2), a.D = q.size(3);
    entries = k_cache.size(0), a.Hk = k_cache.size(1), a.Sk = k_cache.size(2),
    a.Dv = v_cache.size(3);
    FASTATTN_KV_CHECK(a.Sq > 0, "q must have at least one row a sequence");
    FASTATTN_KV_CHECK(a.D > 0 && a.Dv > 0, "head_dim must be at least 1");
    FASTATTN_KV_CHECK(k_cache.size(3) == a.D, "k_cache must have q's head_dim ", a.D);
    FASTATTN_KV_CHECK(
        v_cache.size(0) == entries && v_cache.size(1) == a.Hk && v_cache.size(2) == a.Sk,
        "v_cache must have k_cache's first dimensions");
    FASTATTN_KV_CHECK(a.Hk > 0 && a.H % a.Hk == 0,
                      "q's heads must be a multiple of the cache's, got ", a.H, " and ", a.Hk);
    for (const Tensor* x : {&k_cache, &v_cache})
      FASTATTN_KV_CHECK(x->stride(3) == 1 || x->size(3) == 1, "the caches must have stride 1 in d");
    q = readable(q);
    a.q = unit(q), a.k = unit(k_cache), a.v = unit(v_cache);
  }

  void set_new_rows(const Opt& given_k, const Opt& given_v, const Tensor& k_cache,
                    const Tensor& v_cache) {
    FASTATTN_KV_CHECK(given_k.has_value() == given_v.has_value(), "k and v must be given together");
    if (!given_k) return;
    for (const Tensor* x : {&*given_k, &*given_v})
      FASTATTN_KV_CHECK(x->dim() == 4 && x->scalar_type() == q.scalar_type() && x->size(0) == a.B &&
                            x->size(1) == a.Hk && x->size(2) == given_k->size(2),
                        "k and v must be (B, Hk, Sn, ...) of q's dtype");
    FASTATTN_KV_CHECK(given_k->size(3) == a.D && given_v->size(3) == a.Dv,
                      "k and v must have the caches' head_dims");
    p.Sn = given_k->size(2);
    if (given_k->numel() + given_v->numel() > 0)
      FASTATTN_KV_CHECK(!overlaps(k_cache) && !overlaps(v_cache),
                        "no two elements of a cache may share memory");
    k = readable(*given_k), v = readable(*given_v);
    p.new_k = unit(*k), p.new_v = unit(*v);
  }

  void set_where(const Opt& block_table, const Opt& cache_index) {
    if (block_table) {
      FASTATTN_KV_CHECK(!cache_index, "cache_index does not go with block_table");
      FASTATTN_KV_CHECK(a.Sk > 0, "a page must have at least one slot");
      p.block_table = indices(*block_table, 2, a.B, "block_table");
      p.page_size = a.Sk;
      a.Sk *= block_table->size(1);
    } else if (cache_index) {
      p.cache_index = indices(*cache_index, 1, a.B, "cache_index");
      std::vector<int64_t> seen;
      for (int64_t b = 0; b < a.B; ++b) {
        const int64_t entry = p.cache_index.at(b);
        FASTATTN_KV_CHECK(0 <= entry && entry < entries, "cache_index[", b, "] must be in [0, ",
                          entries, "), got ", entry);
        seen.push_back(entry);
      }
      std::sort(seen.begin(), seen.end());
      FASTATTN_KV_CHECK(!k || std::adjacent_find(seen.begin(), seen.end()) == seen.end(),
                        "sequences that append need entries of their own in cache_index");
    } else {
      FASTATTN_KV_CHECK(entries == a.B, "the cache has ", entries, " entries for ", a.B,
                        " sequences");
    }
  }

  // After set_new_rows and set_where.
  void set_lengths(const Tensor& cache_lens, const Opt& new_lens) {
    const Indices at = indices(cache_lens, 1, a.B, "cache_lens");
    Indices more;
    if (new_lens) {
      FASTATTN_KV_CHECK(k && p.Sn == a.Sq, "new_lens needs k and v of as many rows as q");
      more = indices(*new_lens, 1, a.B, "new_lens");
      p.ragged = true;
    }
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t first = at.at(b), n = more.ptr ? more.at(b) : p.Sn;
      FASTATTN_KV_CHECK(first >= 0, "cache_lens[", b, "] must not be negative, got ", first);
      FASTATTN_KV_CHECK(0 <= n && n <= p.Sn, "new_lens[", b, "] must be in [0, ", p.Sn, "], got ",
                        n);
      FASTATTN_KV_CHECK(first <= a.Sk - n, "the cache is full: sequence ", b, " has ", first,
                        " and ", n, " keys for a capacity of ", a.Sk);
      cache_len.push_back(first), new_len.push_back(n);
      check_pages(b, first + n);
    }
    p.cache_len = cache_len.data(), p.new_len = new_len.data();
  }

  void check_pages(int64_t b, int64_t total) const {
    if (!p.block_table.ptr) return;
    for (int64_t c = 0; c * p.page_size < total; ++c) {
      const int64_t page = p.block_table.at(b, c);
      FASTATTN_KV_CHECK(0 <= page && page < entries, "block_table[", b, ", ", c,
                        "] must be a page in [0, ", entries, "), got ", page);
    }
  }

  // After set_lengths.
  void set_rotary(const Opt& cos, const Opt& sin, bool interleaved) {
    FASTATTN_KV_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
    if (!cos) return;
    for (const Tensor* x : {&*cos, &*sin})
      FASTATTN_KV_CHECK(x->dim() == 2 && x->scalar_type() == ScalarType::Float &&
                            x->is_contiguous() && x->size(0) == cos->size(0) &&
                            x->size(1) == cos->size(1),
                        "cos and sin must be contiguous float32 of one shape (positions, R / 2)");
    p.half = cos->size(1), p.interleaved = interleaved;
    FASTATTN_KV_CHECK(p.half >= 1 && 2 * p.half <= a.D, "rotary must have R <= head_dim ", a.D);
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t total = cache_len[size_t(b)] + new_len[size_t(b)];
      const bool any = !p.ragged || new_len[size_t(b)] > 0;
      FASTATTN_KV_CHECK(!any || total <= cos->size(0), "sequence ", b, " reaches position ",
                        total - 1, ", beyond rotary's ", cos->size(0), " positions");
    }
    // A table without rows can only be asked for rows that are not there.
    if (cos->size(0) == 0) return;
    p.cos = static_cast<const float*>(cos->const_data_ptr());
    p.sin = static_cast<const float*>(sin->const_data_ptr());
  }

  // Instead of tables by position, one row for each row of q and k: cos and sin (B or 1, Sq, R),
  // of which the second half of a row repeats the first. Needs Sn = Sq.
  void set_rotary_of_rows(const Tensor& cos, const Tensor& sin) {
    for (const Tensor* x : {&cos, &sin})
      FASTATTN_KV_CHECK(x->dim() == 3 && (x->size(0) == a.B || x->size(0) == 1) &&
                            x->size(1) == a.Sq && x->size(2) == cos.size(2),
                        "cos and sin must be (B or 1, Sq, R)");
    FASTATTN_KV_CHECK(p.Sn == a.Sq, "cos and sin by rows need as many rows of k as of q");
    p.half = cos.size(2) / 2;
    FASTATTN_KV_CHECK(cos.size(2) % 2 == 0 && p.half >= 1 && 2 * p.half <= a.D,
                      "cos and sin must have R <= head_dim ", a.D, " columns, an even number");
    p.tables_of_rows = true;
    const int64_t n = a.Sq * p.half, batches = cos.size(0);
    for (std::vector<float>* table : {&cos_, &sin_}) {
      const std::vector<float> all = float_values(table == &cos_ ? cos : sin);
      table->resize(size_t(a.B * n));
      for (int64_t b = 0; b < a.B; ++b)
        for (int64_t i = 0; i < a.Sq; ++i)
          std::copy_n(all.data() + ((batches > 1 ? b : 0) * a.Sq + i) * 2 * p.half, p.half,
                      table->data() + b * n + i * p.half);
    }
    p.cos = cos_.data(), p.sin = sin_.data();
  }

  void set_features(const Opt& mask, const Opt& alibi_slopes, const Opt& given_sinks) {
    if (mask) {
      FASTATTN_KV_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
      const int64_t limits[4] = {a.B, a.H, a.Sq, a.Sk};
      a.mask = broadcast(*mask, limits, "mask");
      for (int64_t d = 0; d < mask->dim(); ++d)  // the ops of attention take more than is read
        FASTATTN_KV_CHECK(mask->size(d) == 1 || mask->size(d) == limits[4 - mask->dim() + d],
                          "mask must broadcast to (B, H, Sq, capacity)");
    }
    if (alibi_slopes) {
      const int64_t dims = alibi_slopes->dim();
      const bool two = dims == 2;
      FASTATTN_KV_CHECK(is_float(*alibi_slopes) && (dims == 1 || two) &&
                            alibi_slopes->size(dims - 1) == a.H &&
                            (!two || alibi_slopes->size(0) == a.B),
                        "alibi_slopes must be floats of shape (H,) or (B, H)");
      alibi = float_values(*alibi_slopes);
      a.alibi = alibi.data(), a.alibi_b = two ? a.H : 0;
    }
    if (given_sinks) {
      FASTATTN_KV_CHECK(
          is_float(*given_sinks) && given_sinks->dim() == 1 && given_sinks->size(0) == a.H,
          "sinks must be floats of shape (H,)");
      sinks = float_values(*given_sinks);
      a.sinks = sinks.data();
    }
  }

  void set_numbers(double scale, double softcap, bool causal, int64_t left, int64_t right) {
    a.scale = float(scale), a.softcap = float(softcap);
    a.causal = causal ? fastattn::Causal::kBottomRight : fastattn::Causal::kNone;
    const int64_t furthest = a.Sq + a.Sk;  // further is no further
    a.window_left = std::min(left, furthest), a.window_right = std::min(right, furthest);
  }

 private:
  std::vector<float> cos_, sin_;
};

}  // namespace fastattn::binding
