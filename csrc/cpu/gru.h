// GRU's cell (Cho, 2014; r after the product, as cuDNN and PyTorch have it): gates r z n. The cell
// of the plain RNN (Elman, 1990) beside it.

namespace fastattn {
namespace FASTATTN_ISA {

template <Grade kGrade>
struct GruCell {
  static constexpr int kGates = 3, kSaved = 4;
  static constexpr bool kHasC = false, kKeepsH = true;

  static FASTATTN_INLINE CellOut forward(const CellIn& in, bool) {
    const vf r = sigmoid<kGrade>(in.x[0] + in.a[0]).y, z = carrying_gate<kGrade>(in.x[1] + in.a[1]);
    const vf hn = in.a[2] + in.b_hn, n = tanh_of<kGrade>(fma(r, hn, in.x[2]));
    return {fma(z, in.h - n, n), vf{}, {r, z, n, hn}};
  }

  static FASTATTN_INLINE CellGradOut backward(const CellGradIn& in, bool) {
    const vf r = in.saved[0], z = in.saved[1], n = in.saved[2], hn = in.saved[3];
    const vf dn = in.dh * (1.f - z) * (1.f - n * n);
    const vf dz = in.dh * (in.h_old - n) * (z * (1.f - z));
    return {{dn * hn * (r * (1.f - r)), dz, dn, vf{}}, dn * r, vf{}, in.dh * z};
  }
};

struct RnnCell {
  static constexpr int kGates = 1, kSaved = 0;
  static constexpr bool kHasC = false, kKeepsH = false;

  static FASTATTN_INLINE CellOut forward(const CellIn& in, bool relu) {
    const vf s = in.x[0] + in.a[0];
    return {relu ? (s < vf{} ? vf{} : s) : tanh_of<Grade::kExact>(s), vf{}, {}};
  }

  static FASTATTN_INLINE CellGradOut backward(const CellGradIn& in, bool relu) {
    const vf slope = relu ? (in.h > vf{} ? set1(1.f) : vf{}) : 1.f - in.h * in.h;
    return {{in.dh * slope, vf{}, vf{}, vf{}}, vf{}, vf{}, vf{}};
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
