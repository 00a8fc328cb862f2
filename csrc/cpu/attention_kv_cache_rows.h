// Where the keys of a sequence lie, appending to them, and the rotation of q and k by position.

namespace fastattn {
namespace FASTATTN_ISA {

// Key j of a sequence and kv head: in the entry of a contiguous cache, or in a page.
class Slots {
 public:
  Slots(const AttentionKVCacheParams& params, int64_t b, int64_t hk)
      : p_(params),
        size_(size_of(params.attention.dtype)),
        b_(b),
        page_(params.block_table.ptr ? params.page_size : params.attention.Sk),
        k_(start(params.attention.k, hk)),
        v_(start(params.attention.v, hk)) {}

  char* k(int64_t j) const { return row(p_.attention.k, k_, j); }
  char* v(int64_t j) const { return row(p_.attention.v, v_, j); }

  // Keys from j on that follow one another in memory, a row stride apart.
  int64_t together(int64_t j) const {
    return page_ > 0 ? page_ - (p_.block_table.ptr ? j % page_ : j) : 0;
  }

 private:
  char* start(const Operand& x, int64_t hk) const {
    const int64_t entry = p_.block_table.ptr ? 0 : p_.cache_index.ptr ? p_.cache_index.at(b_) : b_;
    return static_cast<char*>(x.ptr) + (entry * x.b + hk * x.h) * size_;
  }
  char* row(const Operand& x, char* base, int64_t j) const {
    if (!p_.block_table.ptr) return base + j * x.s * size_;
    const int64_t page = p_.block_table.at(b_, j / page_);
    return base + (page * x.b + j % page_ * x.s) * size_;
  }

  const AttentionKVCacheParams& p_;
  const int64_t size_, b_, page_;
  char *const k_, *const v_;
};

// ---- rotary position embedding (Su et al., "RoFormer", 2104.09864) ------------------------------

// x as a value of its own: no product of it is fused into a sum. Every backend and plain PyTorch
// round a rotation in the same places.
FASTATTN_INLINE vf rounded(vf x) {
#if FASTATTN_LEVEL >= 2
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  volatile vf kept = x;
  x = kept;
#endif
  return x;
}

template <class T>
class Rotation {
 public:
  explicit Rotation(const AttentionKVCacheParams& params) : p_(params), half_(params.half) {
    const int64_t n = round_up(half_, W);
    a_ = buffer_.reserve(2 * n), b_ = a_ + n;
    std::fill_n(a_, 2 * n, 0.f);
  }

  // Row i of a sequence, D elements, which stands at a position; to may be x.
  void turn(const T* x, int64_t D, int64_t b, int64_t i, int64_t position, T* to) {
    const int64_t at = (p_.tables_of_rows ? b * p_.Sn + i : position) * half_;
    const float *cos = p_.cos + at, *sin = p_.sin + at;
    const int64_t step = p_.interleaved ? 2 : 1, second = p_.interleaved ? 1 : half_;
    for (int64_t t = 0; t < half_; ++t)
      a_[t] = to_float(x[t * step]), b_[t] = to_float(x[t * step + second]);
    for (int64_t t = 0; t < half_; t += W) {
      const vf c = load_part(cos + t, half_ - t), s = load_part(sin + t, half_ - t);
      const vf a = load(a_ + t), b = load(b_ + t);
      store(a_ + t, rounded(a * c) - rounded(b * s));
      store(b_ + t, rounded(b * c) + rounded(a * s));
    }
    for (int64_t t = 0; t < half_; ++t) {
      to[t * step] = from_float<T>(a_[t]);
      to[t * step + second] = from_float<T>(b_[t]);
    }
    if (to != x) std::copy(x + 2 * half_, x + D, to + 2 * half_);
  }

 private:
  const AttentionKVCacheParams& p_;
  const int64_t half_;
  float *a_, *b_;
  Buffer<float> buffer_;
};

// ---- before the attention: new rows go into the cache, rotated rows of q into scratch -----------

template <class T>
class Preparation {
 public:
  Preparation(const AttentionKVCacheParams& params, T* turned_q)
      : p_(params), a_(params.attention), turned_(turned_q) {}

  int64_t items() const { return a_.B * (a_.Hk + (turned_ ? a_.H : 0)); }
  int64_t elements() const {
    return a_.B * (a_.Hk * p_.Sn * (a_.D + a_.Dv) + (turned_ ? a_.H * a_.Sq * a_.D : 0));
  }

  void run(int64_t item, Rotation<T>& rotation) const {
    const int64_t heads = items() / std::max<int64_t>(a_.B, 1), b = item / heads, h = item % heads;
    if (h < a_.Hk)
      append(b, h, rotation);
    else
      turn_q(b, h - a_.Hk, rotation);
  }

 private:
  void append(int64_t b, int64_t hk, Rotation<T>& rotation) const {
    const Slots slots(p_, b, hk);
    const int64_t first = p_.cache_len[b];
    for (int64_t i = 0; i < p_.new_len[b]; ++i) {
      const T* k = row<T>(p_.new_k, b, hk, i);
      T* to = reinterpret_cast<T*>(slots.k(first + i));
      if (p_.cos)
        rotation.turn(k, a_.D, b, i, first + i, to);
      else
        std::memcpy(to, k, size_t(a_.D) * sizeof(T));
      std::memcpy(slots.v(first + i), row<T>(p_.new_v, b, hk, i), size_t(a_.Dv) * sizeof(T));
    }
  }

  void turn_q(int64_t b, int64_t h, Rotation<T>& rotation) const {
    const int64_t total = p_.cache_len[b] + p_.new_len[b],
                  first = p_.ragged ? p_.cache_len[b] : total - a_.Sq,
                  rows = p_.ragged ? p_.new_len[b] : a_.Sq;
    for (int64_t i = 0; i < rows; ++i)
      rotation.turn(row<T>(a_.q, b, h, i), a_.D, b, i, std::max<int64_t>(first + i, 0),
                    turned_ + ((b * a_.H + h) * a_.Sq + i) * a_.D);
  }

  template <class U>
  static const U* row(const Operand& x, int64_t b, int64_t h, int64_t i) {
    return static_cast<const U*>(x.ptr) + b * x.b + h * x.h + i * x.s;
  }

  const AttentionKVCacheParams& p_;
  const AttentionParams& a_;
  T* const turned_;
};

// turned_q: room for the rows of q, (B, H, Sq, D), where they are rotated; else null.
template <class T>
void prepare(const AttentionKVCacheParams& p, T* turned_q, const Parallel& parallel) {
  const Preparation<T> work(p, turned_q);
  const int64_t n = work.items();
  if (work.elements() == 0) return;
  constexpr int64_t kFew = 32 << 10;  // elements: written before a second thread has woken
  const int workers = work.elements() <= kFew ? 1 : int(std::min<int64_t>(parallel.threads, n));
  Shares shares(n, workers);
  parallel.workers(workers, [&](int worker) {
    Rotation<T> rotation(p);
    for (int64_t i; shares.next(worker, &i);) work.run(i, rotation);
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
