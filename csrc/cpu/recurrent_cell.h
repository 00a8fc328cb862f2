// What the cells share: a few lanes of any storage, tanh by grade, what a cell is given.
//
// A cell works on one vector of hidden units of one sequence. It has
//   kGates, kSaved (vectors saved a step for the backward), kHasC (a cell state), kKeepsH (h enters
//   the new h itself, not only the product: it is carried in fp32) forward(In) -> Out,
//   backward(GradIn) -> GradOut

namespace fastattn {
namespace FASTATTN_ISA {

template <class T>
FASTATTN_INLINE vf load_lanes(const T* p, int64_t n) {
  return n >= W ? load(p) : load_part(p, n);
}
template <class T>
FASTATTN_INLINE void store_lanes(T* p, int64_t n, vf x) {
  if (n >= W) return store(p, x);
  T part[W];
  store(part, x);
  std::memcpy(p, part, size_t(n) * sizeof(T));
}

// tanh: an odd polynomial below 0.625 (Cephes tanhf; coarse: its first terms), so that small values
// keep their digits, and 1 - 2 / (e^2x + 1) above.
template <Grade kGrade>
FASTATTN_INLINE vf tanh_of(vf x) {
  const vf a = x < vf{} ? -x : x, z = x * x, top = set1(9.5f);
  vf p;
  if constexpr (kGrade == Grade::kExact) {
    p = fma(set1(-5.70498872745e-3f), z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
  } else {
    p = set1(-4.3e-2f);  // 3e-4 of the value up to 0.625
  }
  p = fma(p, z, set1(kGrade == Grade::kExact ? 1.33314422036e-1f : 1.315e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf e = exponential2<kGrade>((a > top ? top : a) * (2.f * kLog2e));
  const vf big = 1.f - 2.f * reciprocal<kGrade>(e + 1.f);
  return a < set1(0.625f) ? fma(p * z, x, x) : x < vf{} ? -big : big;
}

// gx and the products by gate; h and c before the step.
struct CellIn {
  vf x[4], a[4];
  vf b_hn, h, c;
};
struct CellOut {
  vf h, c;
  vf saved[4];
};
// dh: all of it; dc: from the step after. saved, h and c as the forward had or made them: c_old and
// h_old before the step.
struct CellGradIn {
  vf dh, dc, saved[4], h, h_old, c, c_old;
};
// d: of gx, by gate; dhn: GRU, of hn; dc, dh: what the step before is given, dh beside the product.
struct CellGradOut {
  vf d[4];
  vf dhn, dc, dh;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
