// What happens to a tile of logits before the softmax: which keys a row may see, masks, bias,
// ALiBi, softcap. Shared by forward, backward and weights, so the three cannot disagree.

namespace fastattn {
namespace FASTATTN_ISA {

// ---- rows of a run-time dtype ----------------------------------------------------------------

inline int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Row s of head h of a (B, H, S, X) operand.
FASTATTN_INLINE char* row_at(const Operand& x, DType dtype, int64_t b, int64_t h, int64_t s) {
  return static_cast<char*>(x.ptr) + (b * x.b + h * x.h + s * x.s) * size_of(dtype);
}

template <class T>
FASTATTN_INLINE void store_row(const float* src, int64_t n, vf factor, T* dst) {
  int64_t t = 0;
  for (; t + W <= n; t += W) store(dst + t, load(src + t) * factor);
  const float f = factor[0];
  for (; t < n; ++t) dst[t] = from_float<T>(src[t] * f);
}

// n floats times factor to a row of dtype with unit stride.
inline void store_row(DType dtype, const float* src, int64_t n, float factor, void* dst) {
  switch (dtype) {
    case DType::kBf16:
      return store_row(src, n, set1(factor), static_cast<bf16*>(dst));
    case DType::kF16:
      return store_row(src, n, set1(factor), static_cast<f16*>(dst));
    default:
      return store_row(src, n, set1(factor), static_cast<float*>(dst));
  }
}

inline void zero_row(DType dtype, int64_t n, void* dst) {
  if (n > 0) std::memset(dst, 0, size_t(n * size_of(dtype)));
}

template <class T>
float dot(const T* a, int64_t step_a, const T* b, int64_t n) {
  int64_t d = 0;
  float sum = 0.f;
  if (step_a == 1) {
    vf c = {};
    for (; d + W <= n; d += W) c = fma(load(a + d), load(b + d), c);
    sum = reduce_add(c);
  }
  for (; d < n; ++d) sum += to_float(a[d * step_a]) * to_float(b[d]);
  return sum;
}

inline float dot(DType dtype, const void* a, int64_t step_a, const void* b, int64_t n) {
  switch (dtype) {
    case DType::kBf16:
      return dot(static_cast<const bf16*>(a), step_a, static_cast<const bf16*>(b), n);
    case DType::kF16:
      return dot(static_cast<const f16*>(a), step_a, static_cast<const f16*>(b), n);
    default:
      return dot(static_cast<const float*>(a), step_a, static_cast<const float*>(b), n);
  }
}

// x[0, n) += factor * src[0, n), a row of dtype with a step.
template <class T>
void add_row(const T* src, int64_t step, int64_t n, float factor, float* x) {
  int64_t t = 0;
  if (step == 0) {
    const float c = factor * to_float(*src);
    for (; t < n; ++t) x[t] += c;
    return;
  }
  if (step == 1)
    for (; t + W <= n; t += W) store(x + t, fma(load(src + t), set1(factor), load(x + t)));
  for (; t < n; ++t) x[t] += factor * to_float(src[t * step]);
}

inline void add_row(DType dtype, const void* src, int64_t offset, int64_t step, int64_t n,
                    float factor, float* x) {
  switch (dtype) {
    case DType::kBf16:
      return add_row(static_cast<const bf16*>(src) + offset, step, n, factor, x);
    case DType::kF16:
      return add_row(static_cast<const f16*>(src) + offset, step, n, factor, x);
    default:
      return add_row(static_cast<const float*>(src) + offset, step, n, factor, x);
  }
}

// ---- what a row sees ----------------------------------------------------------------------------

// One batch entry: its lengths, where its tokens start, and the diagonal.
struct Sequence {
  int64_t b, Sq, Sk, q_start, k_start;
  int64_t shift;  // bottom_right: row i stands at key i + shift
};

// The keys [lo, hi) that causality, window and lengths leave to a row.
struct Interval {
  int64_t lo, hi;
};

inline constexpr int kMaxRows = 64;

// Up to kMaxRows query rows of one kv head. With GQA a block may straddle two query heads.
struct RowBlock {
  int n = 0;
  int64_t h[kMaxRows], i[kMaxRows];
  Interval keys[kMaxRows];
  int64_t lo = 0, hi = 0;            // union of the rows' keys
  int64_t full_lo = 0, full_hi = 0;  // intersection
};

class Problem {
 public:
  explicit Problem(const AttentionParams& params)
      : p(params),
        group(params.H / std::max<int64_t>(params.Hk, 1)),
        plain(params.scale >= std::numeric_limits<float>::min() && params.softcap == 0.f &&
              !params.alibi && !params.bias.ptr),
        dropout(params.dropout_p, params.seed),
        inverse_unit_(1. / unit()) {}

  const AttentionParams& p;
  const int64_t group;  // query heads a kv head
  const bool plain;     // logits are scale * s, so the scale folds into the exponential
  const Dropout dropout;

  // Tiles hold logits in units of unit(): plain ones are never multiplied by scale. A probability
  // is exp2((x - m) * multiplier()); subtracting first keeps huge logits and a bias of finfo.min
  // exact.
  float unit() const { return plain ? p.scale : 1.f; }
  float multiplier() const { return plain ? p.scale * kLog2e : kLog2e; }
  // lse as the backward subtracts it from a tile's logits.
  float in_units(float lse) const { return float(double(lse) * inverse_unit_); }
  vf in_units(vf lse) const { return to_single(to_double(lse) * inverse_unit_); }

  Sequence sequence(int64_t b) const {
    Sequence s{b,
               p.q_len ? p.q_len[b] : p.Sq,
               p.k_len ? p.k_len[b] : p.Sk,
               p.q_start ? p.q_start[b] : 0,
               p.k_start ? p.k_start[b] : 0,
               0};
    if (p.causal == Causal::kBottomRight) s.shift = s.Sk - s.Sq;
    return s;
  }

  Interval keys(const Sequence& s, int64_t i) const {
    Interval r{0, s.Sk};
    const int64_t at = i + s.shift;
    if (p.window_left >= 0) r.lo = std::max<int64_t>(0, at - p.window_left);
    if (p.causal != Causal::kNone) r.hi = std::min(r.hi, at + 1);
    if (p.window_right >= 0) r.hi = std::min(r.hi, at + p.window_right + 1);
    if (r.hi <= r.lo) r = {0, 0};
    return r;
  }

  // Rows [first, first + n) of a kv head's group * Sq rows, head by head.
  void fill(RowBlock& rb, const Sequence& s, int64_t hk, int64_t first, int n) const {
    // In registers: written through to rb, each row would wait for the stores of the one before.
    int64_t lo = std::numeric_limits<int64_t>::max(), hi = 0, full_lo = 0, full_hi = lo;
    int64_t h = hk * group + first / s.Sq, i = first % s.Sq;
    for (int r = 0; r < n; ++r, ++i) {
      if (i == s.Sq) ++h, i = 0;
      rb.h[r] = h, rb.i[r] = i;
      const Interval k = keys(s, i);
      rb.keys[r] = k;
      if (k.hi > k.lo) lo = std::min(lo, k.lo);
      hi = std::max(hi, k.hi);
      full_lo = std::max(full_lo, k.lo);
      full_hi = std::min(full_hi, k.hi);
    }
    rb.n = n;
    rb.lo = std::min(lo, hi), rb.hi = hi;
    rb.full_lo = full_lo, rb.full_hi = full_hi;
  }

  // The keys that rows [first, last) of a kv head may see. Both bounds move one way with the row,
  // so the first and the last row with any key decide.
  Interval range(const Sequence& s, int64_t first, int64_t last) const {
    if (last <= first) return {0, 0};
    int64_t i0 = first % s.Sq, i1 = (last - 1) % s.Sq;
    if (last - first >= s.Sq || i1 < i0) i0 = 0, i1 = s.Sq - 1;  // all rows of some head, or nearly
    Interval a = keys(s, i0), z = keys(s, i1);
    while (a.hi == 0 && i0 < i1) a = keys(s, ++i0);
    while (z.hi == 0 && i1 > i0) z = keys(s, --i1);
    return {a.lo, z.hi};
  }

  // Whether no row sees more than about 2 * limit keys.
  bool narrow(int64_t limit) const {
    const bool right = p.causal != Causal::kNone || (p.window_right >= 0 && p.window_right < limit);
    return right && p.window_left >= 0 && p.window_left < limit;
  }

  const uint8_t* mask_row(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const Broadcast& m = p.mask;
    return static_cast<const uint8_t*>(m.ptr) + b * m.b + h * m.h + i * m.i + j * m.j;
  }

  enum class Tile { kSkip, kPartial, kFull };

  // Whether an elementwise mask leaves nothing, something or everything of keys [j0, j0 + n).
  Tile mask_tile(const RowBlock& rb, const Sequence& s, int64_t j0, int64_t n) const {
    if (!p.mask.ptr) return Tile::kFull;
    const Broadcast& m = p.mask;
    bool any = false, all = true;
    const uint8_t* last = nullptr;
    for (int r = 0; r < rb.n && !(any && !all); ++r) {
      const uint8_t* row = mask_row(s.b, rb.h[r], rb.i[r], j0);
      if (row == last) continue;
      last = row;
      if (m.j == 1) {
        uint8_t some = 0, every = 1;
        for (int64_t t = 0; t < n; ++t) some |= row[t], every &= row[t];
        any |= some != 0, all &= every != 0;
      } else {
        for (int64_t t = 0; t < (m.j ? n : 1); ++t)
          any |= row[t * m.j] != 0, all &= row[t * m.j] != 0;
      }
    }
    return !any ? Tile::kSkip : all ? Tile::kFull : Tile::kPartial;
  }

  // Logits of row r, keys [j0, j0 + n), in place: features, then -inf where a key takes no part. n
  // is padded (n % (2 W) == 0); only the row's own keys are read from mask and bias. dcap: d logits
  // / d (scale s) of the softcap, where wanted.
  void logits(const RowBlock& rb, int r, const Sequence& s, int64_t j0, int64_t n, Tile tile,
              float* x, float* dcap) const {
    const Interval k = rb.keys[r];
    const int64_t a = std::clamp<int64_t>(k.lo - j0, 0, n),
                  z = std::clamp<int64_t>(k.hi - j0, a, n);
    if (!plain) features(s, rb.h[r], rb.i[r], j0, a, z, n, x, dcap);
    if (tile == Tile::kPartial) {
      const uint8_t* m = mask_row(s.b, rb.h[r], rb.i[r], j0);
      const int64_t step = p.mask.j;
      if (step == 1)
        for (int64_t t = a; t < z; ++t) x[t] = m[t] ? x[t] : kNegInf;
      else
        for (int64_t t = a; t < z; ++t) x[t] = m[t * step] ? x[t] : kNegInf;
    }
    for (int64_t t = 0; t < a; ++t) x[t] = kNegInf;
    for (int64_t t = z; t < n; ++t) x[t] = kNegInf;
  }

 private:
  const double inverse_unit_;

  void features(const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t a, int64_t z,
                int64_t n, float* x, float* dcap) const {
    const vf scale = set1(p.scale);
    if (p.bias.ptr && p.bias.j == 1) {
      // Rows of a bias lie too far apart for the hardware to foresee: ask for the next one.
      const int64_t at = s.b * p.bias.b + h * p.bias.h + (i + 1) * p.bias.i + j0;
      const char* next = static_cast<const char*>(p.bias.ptr) + at * size_of(p.bias.dtype);
      const int64_t bytes = z * size_of(p.bias.dtype);
      for (int64_t x64 = 0; x64 < bytes; x64 += 64) prefetch(next + x64);
    }
    if (p.bias.ptr && p.bias.j == 1 && p.softcap == 0.f && !p.alibi &&
        p.bias.dtype == DType::kF32) {
      // The common case in one pass.
      const float* bias =
          static_cast<const float*>(p.bias.ptr) + s.b * p.bias.b + h * p.bias.h + i * p.bias.i + j0;
      int64_t t = a;
      for (; t + W <= z; t += W) store(x + t, fma(load(x + t), scale, load(bias + t)));
      for (; t < z; ++t) x[t] = x[t] * p.scale + bias[t];
      return;
    }
    if (p.softcap != 0.f) {
      const vf cap = set1(p.softcap), inv = set1(1.f / p.softcap);
      for (int64_t t = 0; t < n; t += W) {
        const vf u = tanhv(load(x + t) * scale * inv);
        store(x + t, cap * u);
        if (dcap) store(dcap + t, 1.f - u * u);
      }
    } else if (p.scale != 1.f) {
      for (int64_t t = 0; t < n; t += W) store(x + t, load(x + t) * scale);
    }
    if (p.alibi) {
      const float slope = p.alibi[s.b * p.alibi_b + h];
      const int64_t center = i + s.Sk - s.Sq - j0;
      for (int64_t t = a; t < z; ++t) x[t] -= slope * float(std::abs(center - t));
    }
    if (p.bias.ptr) {
      const Broadcast& c = p.bias;
      const int64_t at = s.b * c.b + h * c.h + i * c.i + (j0 + a) * c.j;
      add_row(c.dtype, c.ptr, at, c.j, z - a, 1.f, x + a);
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
