// Philox-4x32-10 (Salmon et al., SC11), the dropout mask of every backend.
//
// Key = 64-bit seed; counter = (j >> 2, i, b * H + h, site); word j & 3 decides on key j: dropped
// iff word < threshold = round(p * 2^32). Recomputed wherever it is needed, never stored.

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
  // to 32. Eight counters at a time so that the compiler vectorises the rounds.
  void row(int64_t bh, int64_t i, int64_t j0, int64_t n, float* out) const {
    constexpr int kLanes = 8;
    for (int64_t t = 0; t < n; t += 4 * kLanes) {
      uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        c0[l] = uint32_t((j0 + t) >> 2) + uint32_t(l);
        c1[l] = uint32_t(i), c2[l] = uint32_t(bh), c3[l] = 0;
      }
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        for (int l = 0; l < kLanes; ++l) {
          const uint64_t m0 = uint64_t(c0[l]) * 0xD2511F53u, m1 = uint64_t(c2[l]) * 0xCD9E8D57u;
          c0[l] = uint32_t(m1 >> 32) ^ c1[l] ^ k0;
          c1[l] = uint32_t(m1);
          c2[l] = uint32_t(m0 >> 32) ^ c3[l] ^ k1;
          c3[l] = uint32_t(m0);
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      for (int l = 0; l < kLanes; ++l) {
        out[t + 4 * l] = c0[l] < threshold ? 0.f : keep_scale;
        out[t + 4 * l + 1] = c1[l] < threshold ? 0.f : keep_scale;
        out[t + 4 * l + 2] = c2[l] < threshold ? 0.f : keep_scale;
        out[t + 4 * l + 3] = c3[l] < threshold ? 0.f : keep_scale;
      }
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
