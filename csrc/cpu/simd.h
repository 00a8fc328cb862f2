// One vector of floats of the instruction set at hand, and the few operations kernels need.
// +, -, *, comparisons and ?: are the compiler's own on vector types.

namespace fastattn {
namespace FASTATTN_ISA {

#if FASTATTN_LEVEL >= 2
using vf = __m512;
#elif FASTATTN_LEVEL == 1
using vf = __m256;
#else
typedef float vf __attribute__((vector_size(16)));
#endif
inline constexpr int W = sizeof(vf) / sizeof(float);
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

typedef double vd __attribute__((vector_size(8 * W)));  // as many lanes: two registers
typedef double vd_unaligned __attribute__((vector_size(8 * W), aligned(8), may_alias));

inline constexpr float kNegInf = -std::numeric_limits<float>::infinity();
inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr double kLog2eExact = 1.44269504088896340736, kLn2Exact = 0.69314718055994530942;

#define FASTATTN_INLINE inline __attribute__((always_inline))
// Loops that own the registers: inlined into their callers, GCC spills their addresses.
#define FASTATTN_NOINLINE __attribute__((noinline))

FASTATTN_INLINE vf set1(float x) { return x - vf{}; }
FASTATTN_INLINE vf load(const float* p) { return vf(*reinterpret_cast<const vf_unaligned*>(p)); }
FASTATTN_INLINE vd load(const double* p) { return vd(*reinterpret_cast<const vd_unaligned*>(p)); }
FASTATTN_INLINE vd to_double(vf x) { return __builtin_convertvector(x, vd); }
FASTATTN_INLINE vf to_single(vd x) { return __builtin_convertvector(x, vf); }
FASTATTN_INLINE void store(float* p, vf x) {
  *reinterpret_cast<vf_unaligned*>(p) = vf_unaligned(x);
}
// Heads that a model made by transposing lie a row apart by more than the hardware's prefetchers
// follow: whoever walks such rows asks for the next ones.
FASTATTN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
FASTATTN_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }
FASTATTN_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted: -ffp-contract=fast

FASTATTN_INLINE vf vmax(vf a, vf b) {
#if FASTATTN_LEVEL >= 2
  return _mm512_max_ps(a, b);
#elif FASTATTN_LEVEL == 1
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FASTATTN_INLINE float reduce_max(vf x) {
#if FASTATTN_LEVEL >= 2
  return _mm512_reduce_max_ps(x);
#else
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

FASTATTN_INLINE float reduce_add(vf x) {
#if FASTATTN_LEVEL >= 2
  return _mm512_reduce_add_ps(x);
#elif FASTATTN_LEVEL == 1
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  float s = 0.f;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
#endif
}

// ---- storage types -------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTATTN_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FASTATTN_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

FASTATTN_INLINE float to_float(float x) { return x; }
FASTATTN_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FASTATTN_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
  const float tiny = float(rest) * 0x1p-24f;  // subnormal or zero
  return sign ? -tiny : tiny;
}

template <class T>
FASTATTN_INLINE T from_float(float x);
template <>
FASTATTN_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FASTATTN_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t(u >> 16 | 0x40)};  // NaN stays NaN
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
FASTATTN_INLINE f16 from_float<f16>(float x) {
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (a >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to inf
  if (a < 0x38800000) {                                   // below 2^-14: subnormal
    // Adding 0.5 puts the rounding position of a float on that of a subnormal half.
    const uint32_t r = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000;
    return {uint16_t(sign | r)};
  }
  return {uint16_t(sign | ((a + 0xfff + (a >> 13 & 1)) - 0x38000000) >> 13)};
}

FASTATTN_INLINE vf load(const bf16* p) {
#if FASTATTN_LEVEL >= 2
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif FASTATTN_LEVEL == 1
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}
// 2 W neighbours, those at even and those at odd places: half the instructions of two loads.
FASTATTN_INLINE void load_pairs(const bf16* p, vf* even, vf* odd) {
#if FASTATTN_LEVEL >= 2
  const __m512i u = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000u))));
#elif FASTATTN_LEVEL == 1
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000u))));
#else
  *even = vf{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])};
  *odd = vf{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])};
#endif
}
// Of n < 2 W neighbours, then zeros.
FASTATTN_INLINE void load_pairs_part(const bf16* p, int64_t n, vf* even, vf* odd) {
  bf16 some[2 * W] = {};
  std::memcpy(some, p, size_t(n) * sizeof(bf16));
  load_pairs(some, even, odd);
}
// Back to their order.
FASTATTN_INLINE void zip_pairs(vf even, vf odd, vf* first, vf* second) {
#if FASTATTN_LEVEL >= 2
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  *first = _mm512_permutex2var_ps(even, low, odd);
  *second = _mm512_permutex2var_ps(even, high, odd);
#elif FASTATTN_LEVEL == 1
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  *first = _mm256_permute2f128_ps(low, high, 0x20);
  *second = _mm256_permute2f128_ps(low, high, 0x31);
#else
  *first = vf{even[0], odd[0], even[1], odd[1]}, *second = vf{even[2], odd[2], even[3], odd[3]};
#endif
}
FASTATTN_INLINE vf load(const f16* p) {
#if FASTATTN_LEVEL >= 2
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FASTATTN_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

FASTATTN_INLINE void store(bf16* p, vf x) {
#if FASTATTN_LEVEL >= 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(_mm512_cvtneps_pbh(x)));
#elif FASTATTN_LEVEL == 2  // from_float of every lane
  const __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i r =
      _mm512_mask_or_epi32(_mm512_srli_epi32(up, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high,
                           _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
#elif FASTATTN_LEVEL == 1
  const __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16),
                                       _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < W; ++i) p[i] = from_float<bf16>(x[i]);
#endif
}
FASTATTN_INLINE void store(f16* p, vf x) {
#if FASTATTN_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
#elif FASTATTN_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
#else
  for (int i = 0; i < W; ++i) p[i] = from_float<f16>(x[i]);
#endif
}

#if FASTATTN_LEVEL >= 2
// 16 x 16 transpose in registers: 64 shuffles.
FASTATTN_INLINE void transpose16(vf (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

// Lane r of the result: the sum of row[r]. Half the shuffles of a transpose: each halves the
// vectors.
FASTATTN_INLINE vf reduce_add_rows(vf (&row)[W]) {
#if FASTATTN_LEVEL >= 2
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf *r = row + 4 * i,
             a = vf(_mm512_unpacklo_ps(r[0], r[1])) + vf(_mm512_unpackhi_ps(r[0], r[1])),
             b = vf(_mm512_unpacklo_ps(r[2], r[3])) + vf(_mm512_unpackhi_ps(r[2], r[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    four[i] = vf(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d))) +
              vf(_mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
  __m512 two[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    two[i] = vf(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88)) +
             vf(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  return vf(_mm512_shuffle_f32x4(two[0], two[1], 0x88)) +
         vf(_mm512_shuffle_f32x4(two[0], two[1], 0xdd));
#elif FASTATTN_LEVEL == 1
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(row[0], row[1]), _mm256_hadd_ps(row[2], row[3])),
               high =
                   _mm256_hadd_ps(_mm256_hadd_ps(row[4], row[5]), _mm256_hadd_ps(row[6], row[7]));
  return vf(_mm256_permute2f128_ps(low, high, 0x20)) + vf(_mm256_permute2f128_ps(low, high, 0x31));
#else
  vf m;
  for (int r = 0; r < W; ++r) m[r] = reduce_add(row[r]);
  return m;
#endif
}

// Lane r of the result: the maximum of row[r].
FASTATTN_INLINE vf reduce_max_rows(vf (&row)[W]) {
#if FASTATTN_LEVEL >= 2
  transpose16(row);
#pragma GCC unroll 4
  for (int step = 8; step > 0; step /= 2)
    for (int r = 0; r < step; ++r) row[r] = vmax(row[r], row[r + step]);
  return row[0];
#else
  vf m;
  for (int r = 0; r < W; ++r) m[r] = reduce_max(row[r]);
  return m;
#endif
}

// ---- exponentials --------------------------------------------------------------------------

// 2^x for x <= ~127, 0 below -126 and at -inf, NaN at NaN. kDegree 6: 1 ulp of fp32; kDegree 4:
// 3e-6, for weights that are rounded to bf16 (2e-3) next. Coefficients: minimax of the relative
// error on [0, 1) (AVX-512: x - floor(x) and scalef are one instruction each) and [-1/2, 1/2].
template <int kDegree>
FASTATTN_INLINE vf exp2v(vf x) {
#if FASTATTN_LEVEL >= 2
  static constexpr float c4[] = {1.000002593368981f, 0.6930038345327197f, 0.24144275655041317f,
                                 0.05201146118757034f, 0.013534167615718079f};
  static constexpr float c6[] = {
      1.0000000018558002f,   0.6931469838406884f,    0.24022983627312f,      0.05548334198827185f,
      0.009678840988827889f, 0.0012439687892978016f, 0.00021702255239344908f};
  // Reduce first, so that x = -inf gives f = 0 (0x09: suppress exceptions, round down).
  const vf f = _mm512_reduce_ps(x, 0x09);
#else
  static constexpr float c4[] = {1.0000000716546724f,   0.6931469670643624f,
                                 0.24022119723881497f,  0.05550713274149426f,
                                 0.009675541332785205f, 0.001327647178203593f};
  static constexpr float c6[] = {
      1.000000000554168f,   0.693147205737265f,     0.240226468906279f,     0.055503287769696194f,
      0.00961848895777587f, 0.0013399931217780198f, 0.00015345811825493038f};
  constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const vf low = set1(-126.f);
  const vf xc = x < low ? low : x;  // a NaN passes
  const vf t = xc + kMagic;
  const vf f = xc - (t - kMagic);
#endif
  const float* c = kDegree == 6 ? c6 : c4;
  constexpr int n = kDegree == 6 ? 6 : int(sizeof(c4) / sizeof(float)) - 1;
  vf p = set1(c[n]);
#pragma GCC unroll 8
  for (int i = n - 1; i >= 0; --i) p = fma(p, f, set1(c[i]));
#if FASTATTN_LEVEL >= 2
  // Below 2^-126: 0. A subnormal weight would slow every product that it enters a hundredfold.
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.f), _CMP_NLT_UQ), p, x);
#else
  const vf y = vf(vi(p) + (vi(t) << 23));
  return x < low ? vf{} : y;
#endif
}

// log2 of a finite x > 0 that is not subnormal, to 2 ulp: polynomial of Cephes logf on [sqrt(1/2),
// sqrt(2)).
FASTATTN_INLINE vf log2v(vf x) {
  const vi e = (vi(x) - 0x3f3504f3) >> 23;
  const vf f = vf(vi(x) - (e << 23)) - 1.f;
  static constexpr float c[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                -2.4999993993e-1f, 3.3333331174e-1f};
  vf p = set1(7.0376836292e-2f);
#pragma GCC unroll 8
  for (const float ci : c) p = fma(p, f, set1(ci));
  const vf z = f * f;
  const vf log_f = fma(p * z, f, fma(z, set1(-0.5f), f));
  return fma(log_f, set1(kLog2e), __builtin_convertvector(e, vf));
}

// tanh to 2 ulp: odd polynomial below 0.625 (Cephes tanhf), 1 - 2 / (e^2x + 1) above.
FASTATTN_INLINE vf tanhv(vf x) {
  const vf a = x < vf{} ? -x : x;
  const vf z = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf small = fma(p * z, x, x);
  const vf top = set1(9.5f);  // tanh is 1 in fp32 from 9.01 on
  const vf e = exp2v<6>((a > top ? top : a) * (2.f * kLog2e));
  const vf big = 1.f - 2.f / (e + 1.f);
  const vf signed_big = x < vf{} ? -big : big;
  return a < set1(0.625f) ? small : signed_big;
}

// ---- memory --------------------------------------------------------------------------------

FASTATTN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FASTATTN_INLINE int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// 64-byte aligned scratch that only grows; the contents do not survive a growth.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  T* reserve(int64_t n) {
    const size_t wanted = size_t(n) * sizeof(T);
    if (wanted > bytes_) {
      release();
      data_ = static_cast<T*>(scratch_take(wanted, &bytes_));
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  void release() {
    if (data_) scratch_give(data_, bytes_);
    data_ = nullptr, bytes_ = 0;
  }
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
