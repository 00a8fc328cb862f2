// The portable kernels against a naive double-precision attention, without Python or torch: what
// runs them on another architecture. Natively, or crossed and emulated:
//
//   g++ -std=c++20 -O2 -ffp-contract=fast tests/portable_check.cpp csrc/cpu/attention_portable.cpp
//       csrc/cpu/scratch.cpp csrc/cpu/isa.cpp -o build/portable_check && build/portable_check
//   (aarch64: aarch64-linux-gnu-g++ -static ..., then qemu-aarch64-static)
//
// Prints the largest errors; exits with 1 where one is too large.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/cpu/attention.h"

using namespace fastattn;

namespace {

struct Case {
  const char* name;
  int64_t H, Hk, Sq, Sk, D;
  Causal causal;
  int64_t left, right;
  float softcap;
};

double worst = 0.;

void compare(const char* name, const char* what, const std::vector<float>& got,
             const std::vector<double>& want) {
  double error = 0., norm = 0.;
  for (size_t i = 0; i < want.size(); ++i)
    error += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
  const double relative = std::sqrt(error / (norm + 1e-30));
  std::printf("%-28s %-3s %.2e\n", name, what, relative);
  if (!(relative <= worst)) worst = relative;
}

void check(const Case& c) {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  const auto random = [&](int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(generator);
    return x;
  };
  const int64_t nq = c.H * c.Sq * c.D, nk = c.Hk * c.Sk * c.D;
  std::vector<float> q = random(nq), k = random(nk), v = random(nk), g = random(nq), o(nq), dq(nq),
                     dk(nk), dv(nk), lse(c.H * c.Sq), lo(c.H * c.Sq);
  AttentionParams p;
  p.B = 1, p.H = c.H, p.Hk = c.Hk, p.D = p.Dv = c.D, p.Sq = c.Sq, p.Sk = c.Sk;
  p.scale = 1.f / std::sqrt(float(c.D)), p.softcap = c.softcap, p.causal = c.causal;
  p.window_left = c.left, p.window_right = c.right;
  const auto of = [&](std::vector<float>& x, int64_t s) {
    return Operand{x.data(), int64_t(x.size()), s * c.D, c.D, 1};
  };
  p.q = of(q, c.Sq), p.k = of(k, c.Sk), p.v = of(v, c.Sk), p.o = of(o, c.Sq);
  p.lse = lse.data(), p.lse_lo = lo.data();
  p.lse_b = c.H * c.Sq, p.lse_h = c.Sq, p.lse_s = 1;
  AttentionGrads grads;
  grads.d_o = of(g, c.Sq), grads.dq = of(dq, c.Sq), grads.dk = of(dk, c.Sk),
  grads.dv = of(dv, c.Sk);
  portable::attention_forward(p, Parallel{});
  portable::attention_backward(p, grads, Parallel{});

  std::vector<double> O(nq), DQ(nq), DK(nk), DV(nk);
  const int64_t shift = c.causal == Causal::kBottomRight ? c.Sk - c.Sq : 0;
  for (int64_t h = 0; h < c.H; ++h) {
    const int64_t hk = h / (c.H / c.Hk);
    const float *K = &k[hk * c.Sk * c.D], *V = &v[hk * c.Sk * c.D];
    for (int64_t i = 0; i < c.Sq; ++i) {
      const int64_t row = (h * c.Sq + i) * c.D;
      std::vector<double> P(c.Sk, 0.), slope(c.Sk, 1.), dP(c.Sk, 0.);
      double sum = 0.;
      for (int64_t j = 0; j < c.Sk; ++j) {
        const int64_t at = i + shift;
        if (c.causal != Causal::kNone && j > at) continue;
        if (c.left >= 0 && j < at - c.left) continue;
        if (c.right >= 0 && j > at + c.right) continue;
        double s = 0.;
        for (int64_t d = 0; d < c.D; ++d) s += double(q[row + d]) * K[j * c.D + d];
        s *= p.scale;
        if (c.softcap != 0.f) {
          const double t = std::tanh(s / c.softcap);
          s = c.softcap * t, slope[j] = 1. - t * t;
        }
        sum += P[j] = std::exp(s);
      }
      double delta = 0.;
      for (int64_t j = 0; j < c.Sk && sum > 0.; ++j) {
        P[j] /= sum;
        for (int64_t d = 0; d < c.D; ++d) {
          O[row + d] += P[j] * V[j * c.D + d];
          dP[j] += double(g[row + d]) * V[j * c.D + d];
          DV[(hk * c.Sk + j) * c.D + d] += P[j] * g[row + d];
        }
        delta += P[j] * dP[j];
      }
      for (int64_t j = 0; j < c.Sk; ++j) {
        const double ds = P[j] * (dP[j] - delta) * slope[j] * p.scale;
        for (int64_t d = 0; d < c.D; ++d) {
          DQ[row + d] += ds * K[j * c.D + d];
          DK[(hk * c.Sk + j) * c.D + d] += ds * q[row + d];
        }
      }
    }
  }
  compare(c.name, "o", o, O), compare(c.name, "dq", dq, DQ);
  compare(c.name, "dk", dk, DK), compare(c.name, "dv", dv, DV);
}

}  // namespace

int main() {
  const Case cases[] = {
      {"plain", 2, 2, 70, 201, 64, Causal::kNone, -1, -1, 0.f},
      {"causal, odd head_dim", 2, 1, 131, 131, 33, Causal::kTopLeft, -1, -1, 0.f},
      {"bottom_right, window", 4, 2, 50, 90, 40, Causal::kBottomRight, 30, 5, 0.f},
      {"softcap", 1, 1, 65, 77, 16, Causal::kNone, -1, -1, 5.f},
      {"decode", 4, 1, 1, 300, 64, Causal::kNone, -1, -1, 0.f},
  };
  for (const Case& c : cases) check(c);
  std::printf("largest relative error %.2e (bound 2e-6)\n", worst);
  return worst < 2e-6 ? 0 : 1;
}
