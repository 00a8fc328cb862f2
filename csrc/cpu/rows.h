// Rows of any storage type as padded fp32 rows, and loops over them.
//
// A padded row has room for N rounded up to kPad; what lies beyond N is finite and never counted.

namespace fastattn {
namespace FASTATTN_ISA {

inline constexpr int64_t kPad = 32;           // floats: a whole number of vectors and Philox calls
inline constexpr int64_t kSerial = 16 << 10;  // elements: fewer are done before a thread has woken

// Lanes 0..n-1 of x, 0 beyond.
FASTATTN_INLINE vf first_lanes(vf x, int64_t n) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < int32_t(n) ? x : vf{};
}

template <class T>
FASTATTN_INLINE void widen(const T* src, int64_t n, float* dst) {
  int64_t t = 0;
  for (; t + W <= n; t += W) store(dst + t, load(src + t));
  if (t < n) store(dst + t, load_part(src + t, n - t));
}

template <class T>
FASTATTN_INLINE void narrow(const float* src, int64_t n, T* dst) {
  int64_t t = 0;
  for (; t + W <= n; t += W) store(dst + t, load(src + t));
  for (; t < n; ++t) dst[t] = from_float<T>(src[t]);
}

inline void widen(DType dtype, const void* src, int64_t n, float* dst) {
  switch (dtype) {
    case DType::kBf16:
      return widen(static_cast<const bf16*>(src), n, dst);
    case DType::kF16:
      return widen(static_cast<const f16*>(src), n, dst);
    default:
      return widen(static_cast<const float*>(src), n, dst);
  }
}

inline int64_t item_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline char* row_of(const Rows& x, int64_t m) {
  return static_cast<char*>(x.ptr) + m * x.stride * item_size(x.dtype);
}

// Row m as fp32: where it lies if it can be read in whole vectors, else a copy in scratch.
inline const float* read_row(const Rows& x, int64_t m, int64_t n, float* scratch) {
  const char* src = row_of(x, m);
  if (x.dtype == DType::kF32 && n % W == 0) return reinterpret_cast<const float*>(src);
  widen(x.dtype, src, n, scratch);
  return scratch;
}

// Where to compute row m: the result itself if whole vectors fit it, else scratch for write_row.
inline float* begin_row(const Rows& x, int64_t m, int64_t n, float* scratch) {
  if (x.dtype == DType::kF32 && n % W == 0) return reinterpret_cast<float*>(row_of(x, m));
  return scratch;
}

inline void narrow_to(DType dtype, const float* src, int64_t n, char* dst) {
  switch (dtype) {
    case DType::kBf16:
      return narrow(src, n, reinterpret_cast<bf16*>(dst));
    case DType::kF16:
      return narrow(src, n, reinterpret_cast<f16*>(dst));
    default:
      if (reinterpret_cast<const char*>(src) != dst) std::memcpy(dst, src, size_t(n) * 4);
  }
}

inline void write_row(const Rows& x, int64_t m, int64_t n, const float* src) {
  narrow_to(x.dtype, src, n, row_of(x, m));
}

// A vector as a padded fp32 row; null where it is absent.
inline const float* read_vec(const Vec& x, int64_t n, Buffer<float>& scratch) {
  if (!x.ptr) return nullptr;
  if (x.dtype == DType::kF32 && n % W == 0) return static_cast<const float*>(x.ptr);
  widen(x.dtype, x.ptr, n, scratch.reserve(round_up(n, kPad)));
  return scratch.data();
}

// The factors of row i of a site: 0 or 1 / (1 - p).
FASTATTN_INLINE void drop_row(const Dropout& drop, const DropoutSite& at, int64_t m, int64_t n,
                              float* out) {
  const int64_t i = at.first_row + m;
  drop.row(i >> 32, i, 0, n, out, at.site);
}

// The blocks of rows of a sum over rows: at most 64, of a size that M alone decides.
struct RowBlocks {
  int64_t rows, count;
  explicit RowBlocks(int64_t M) {
    rows = std::max<int64_t>(8, div_up(M, 64));
    count = div_up(M, rows);
  }
};

inline int workers_for(int64_t elements, int64_t items, const Parallel& parallel) {
  if (elements <= kSerial) return 1;
  return int(std::min<int64_t>(parallel.threads, items));
}

// Sums over rows, a partial one a block: what a block adds lies in its own part, and parts are
// added up in order, so the thread count cannot be seen in the result.
class RowSums {
 public:
  RowSums(int64_t blocks, int64_t N, int sums) : blocks_(blocks), n_(round_up(N, kPad)) {
    size_ = sums * n_;
    parts_.reserve(std::max<int64_t>(1, blocks_ * size_));
  }
  void clear(int64_t block) { std::fill_n(part(block, 0), size_, 0.f); }
  float* part(int64_t block, int sum) { return parts_.data() + block * size_ + sum * n_; }

  void total(int sum, int64_t N, float* out) {
    if (!out) return;
    std::fill_n(out, N, 0.f);
    for (int64_t b = 0; b < blocks_; ++b) {
      const float* from = part(b, sum);
      for (int64_t t = 0; t < N; ++t) out[t] += from[t];
    }
  }

 private:
  int64_t blocks_, n_, size_;
  Buffer<float> parts_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
