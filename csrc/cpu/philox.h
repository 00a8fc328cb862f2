// Philox-4x32-10 (Salmon et al., SC11), the dropout mask of every backend.
//
// Key = 64-bit seed; counter = (j >> 2, i, b * H + h, site), attention's site being 0; word j & 3
// decides on key j: dropped iff word < threshold = round(p * 2^32). Recomputed wherever it is
// needed, never stored.

namespace fastattn {
namespace FASTATTN_ISA {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float keep_scale = 1.f;
  bool on = false;

  Dropout() = default;
  Dropout(double p, uint64_t seed_) : seed(seed_), on(p > 0.) {
    const double t = std::nearbyint(p * 4294967296.0);
    threshold = t >= 4294967295.0 ? 0xffffffffu : uint32_t(t);
    keep_scale = float(1.0 / (1.0 - p));
  }

  // out[t] = 0 or keep_scale for key j0 + t, t < n. j0 % 4 == 0; out has room for n rounded up
  // to 32.
  void row(int64_t bh, int64_t i, int64_t j0, int64_t n, float* out, uint32_t site = 0) const {
    for (int64_t t = 0; t < n; t += 4 * kLanes) {
      Counters c;
      for (int l = 0; l < kLanes; ++l) {
        c.word[0][l] = uint32_t((j0 + t) >> 2) + uint32_t(l);
        c.word[1][l] = uint32_t(i), c.word[2][l] = uint32_t(bh), c.word[3][l] = site;
      }
      rounds(c);
      store_transposed(c, out + t);
    }
  }

  // out[x][l] = 0 or keep_scale for key 4 group + x of row i0 + l, the row's high word in place of
  // b * H + h.
  void column4(int64_t i0, int64_t group, uint32_t site, float (&out)[4][16]) const {
    for (int half = 0; half < 16; half += kLanes) {
      Counters c;
      for (int l = 0; l < kLanes; ++l) {
        const int64_t i = i0 + half + l;
        c.word[0][l] = uint32_t(group), c.word[1][l] = uint32_t(i);
        c.word[2][l] = uint32_t(i >> 32), c.word[3][l] = site;
      }
      rounds(c);
      for (int x = 0; x < 4; ++x)
        for (int l = 0; l < kLanes; ++l) out[x][half + l] = factor(c.word[x][l]);
    }
  }

 private:
  // Eight counters at a time: two registers of products a round and word, on every instruction set.
  static constexpr int kLanes = 8;
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  struct Counters {
    Words word[4];
  };

  float factor(uint32_t word) const { return word < threshold ? 0.f : keep_scale; }

  // High and low words of x m.
  static FASTATTN_INLINE void multiply(Words x, uint32_t m, Words* hi, Words* lo) {
#if FASTATTN_LEVEL >= 1
    const __m256i factor = _mm256_set1_epi32(int(m)), a = __m256i(x);
    const __m256i even = _mm256_mul_epu32(a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    *hi = Words(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
    *lo = Words(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product = uint64_t(x[l]) * m;
      (*hi)[l] = uint32_t(product >> 32), (*lo)[l] = uint32_t(product);
    }
#endif
  }

  void rounds(Counters& c) const {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      Words hi0, lo0, hi1, lo1;
      multiply(c.word[0], 0xD2511F53u, &hi0, &lo0);
      multiply(c.word[2], 0xCD9E8D57u, &hi1, &lo1);
      c.word[0] = hi1 ^ c.word[1] ^ k0;
      c.word[1] = lo1;
      c.word[2] = hi0 ^ c.word[3] ^ k1;
      c.word[3] = lo0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }

  // out[4 l + x] from word x of counter l.
  void store_transposed(const Counters& c, float* out) const {
#if FASTATTN_LEVEL >= 1
    const __m256 keep = _mm256_set1_ps(keep_scale);
    const __m256i least = _mm256_set1_epi32(int(threshold));
    __m256 v[4];
    for (int x = 0; x < 4; ++x) {
      const __m256i w = __m256i(c.word[x]);
      v[x] = _mm256_and_ps(keep,
                           _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(w, least), w)));
    }
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d d = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
    const __m256d e = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    const __m256 l04 = _mm256_castpd_ps(_mm256_unpacklo_pd(a, d));
    const __m256 l15 = _mm256_castpd_ps(_mm256_unpackhi_pd(a, d));
    const __m256 l26 = _mm256_castpd_ps(_mm256_unpacklo_pd(b, e));
    const __m256 l37 = _mm256_castpd_ps(_mm256_unpackhi_pd(b, e));
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(l04, l15, 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(l26, l37, 0x20));
    _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(l04, l15, 0x31));
    _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(l26, l37, 0x31));
#else
    for (int l = 0; l < kLanes; ++l)
      for (int x = 0; x < 4; ++x) out[4 * l + x] = factor(c.word[x][l]);
#endif
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
