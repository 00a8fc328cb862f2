// A call of attention over a KV cache for the CPU's kernel: every argument checked, values too,
// before anything is written. Stable ABI only. The Python layer words a refusal for the caller.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../cpu/attention_kv_cache.h"
#include "attention_kv_cache_args.h"
#include "cpu.h"

namespace fastattn::binding {

inline Indices indices(const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Long;
  return {x.const_data_ptr(), wide, x.stride(0), x.dim() > 1 ? x.stride(1) : 0};
}

inline std::vector<float> float_values(const Tensor& x) {
  const Tensor f = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  const float* p = static_cast<const float*>(f.const_data_ptr());
  return std::vector<float>(p, p + f.numel());
}

// The rows are read with unit stride in d.
inline Tensor readable(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

struct KVCacheCall {
  AttentionKVCacheParams p;
  AttentionParams& a = p.attention;
  Tensor q;
  Opt k, v;
  int64_t entries = 0;
  std::vector<int64_t> cache_len, new_len;
  std::vector<float> alibi, sinks;

  explicit KVCacheCall(const CacheArguments& given) : q(given.q) {
    set_caches(a, given);
    entries = given.k_cache.size(0);
    q = readable(q);
    a.q = unit(q);
    p.Sn = new_rows(a, given);
    if (given.k) {
      k = readable(*given.k), v = readable(*given.v);
      p.new_k = unit(*k), p.new_v = unit(*v);
    }
    set_where(given);
    set_lengths(given);
    set_rotary(given);
    set_cache_features(a, given);
    if (given.alibi_slopes) alibi = float_values(*given.alibi_slopes), a.alibi = alibi.data();
    if (given.sinks) sinks = float_values(*given.sinks), a.sinks = sinks.data();
  }

  // Instead of tables by position, one row for each row of q and k: cos and sin (B or 1, Sq, R),
  // of which the second half of a row repeats the first. Needs Sn = Sq.
  void set_rotary_of_rows(const Tensor& cos, const Tensor& sin) {
    for (const Tensor* x : {&cos, &sin})
      FASTATTN_CHECK(x->dim() == 3 && (x->size(0) == a.B || x->size(0) == 1) &&
                         x->size(1) == a.Sq && x->size(2) == cos.size(2) &&
                         x->size(0) == cos.size(0),
                     "cos and sin must be (B or 1, Sq, R)");
    FASTATTN_CHECK(p.Sn == a.Sq, "cos and sin by rows need as many rows of k as of q");
    p.half = cos.size(2) / 2;
    FASTATTN_CHECK(cos.size(2) % 2 == 0 && p.half >= 1 && 2 * p.half <= a.D,
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

 private:
  void set_where(const CacheArguments& given) {
    check_where(a, given);
    if (given.block_table) {
      p.block_table = indices(*given.block_table);
      p.page_size = a.Sk;
      a.Sk *= given.block_table->size(1);
    } else if (given.cache_index) {
      p.cache_index = indices(*given.cache_index);
      std::vector<int64_t> seen;
      for (int64_t b = 0; b < a.B; ++b) {
        const int64_t entry = p.cache_index.at(b);
        FASTATTN_CHECK(0 <= entry && entry < entries, "cache_index[", b, "] must be in [0, ",
                       entries, "), got ", entry);
        seen.push_back(entry);
      }
      std::sort(seen.begin(), seen.end());
      FASTATTN_CHECK(!k || std::adjacent_find(seen.begin(), seen.end()) == seen.end(),
                     "sequences that append need entries of their own in cache_index");
    }
  }

  // After set_where.
  void set_lengths(const CacheArguments& given) {
    check_lengths(a, given, p.Sn);
    const Indices at = indices(given.cache_lens);
    Indices more;
    if (given.new_lens) more = indices(*given.new_lens), p.ragged = true;
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t first = at.at(b), n = more.ptr ? more.at(b) : p.Sn;
      FASTATTN_CHECK(first >= 0, "cache_lens[", b, "] must not be negative, got ", first);
      FASTATTN_CHECK(0 <= n && n <= p.Sn, "new_lens[", b, "] must be in [0, ", p.Sn, "], got ", n);
      FASTATTN_CHECK(first <= a.Sk - n, "the cache is full: sequence ", b, " has ", first, " and ",
                     n, " keys for a capacity of ", a.Sk);
      cache_len.push_back(first), new_len.push_back(n);
      check_pages(b, first + n);
    }
    if (p.block_table.ptr && p.Sn > 0) check_written_pages();
    p.cache_len = cache_len.data(), p.new_len = new_len.data();
  }

  void check_pages(int64_t b, int64_t total) const {
    if (!p.block_table.ptr) return;
    for (int64_t c = 0; c * p.page_size < total; ++c) {
      const int64_t page = p.block_table.at(b, c);
      FASTATTN_CHECK(0 <= page && page < entries, "block_table[", b, ", ", c,
                     "] must be a page in [0, ", entries, "), got ", page);
    }
  }

  // Two sequences that append to one page would write over each other; any may read it.
  void check_written_pages() const {
    std::vector<int64_t> written;
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t first = cache_len[size_t(b)], end = first + new_len[size_t(b)];
      if (first == end) continue;
      for (int64_t c = first / p.page_size; c * p.page_size < end; ++c)
        written.push_back(p.block_table.at(b, c));
    }
    std::sort(written.begin(), written.end());
    const auto twice = std::adjacent_find(written.begin(), written.end());
    FASTATTN_CHECK(twice == written.end(), "block_table has page ", *twice,
                   " twice among those that are appended to");
  }

  // After set_lengths.
  void set_rotary(const CacheArguments& given) {
    p.half = rotary_half(a, given), p.interleaved = given.interleaved;
    if (!p.half) return;
    const int64_t positions = given.cos->size(0);
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t total = cache_len[size_t(b)] + new_len[size_t(b)];
      const bool any = !p.ragged || new_len[size_t(b)] > 0;
      FASTATTN_CHECK(!any || total <= positions, "sequence ", b, " reaches position ", total - 1,
                     ", beyond rotary's ", positions, " positions");
    }
    // A table without rows can only be asked for rows that are not there.
    if (positions == 0) return;
    p.cos = static_cast<const float*>(given.cos->const_data_ptr());
    p.sin = static_cast<const float*>(given.sin->const_data_ptr());
  }

  std::vector<float> cos_, sin_;
};

}  // namespace fastattn::binding
