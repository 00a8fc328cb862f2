// LSTM's cell (Hochreiter and Schmidhuber, 1997; Gers, 2000): gates i f g o.

namespace fastattn {
namespace FASTATTN_ISA {

template <Grade kGrade>
struct LstmCell {
  static constexpr int kGates = 4, kSaved = 4;
  static constexpr bool kHasC = true, kKeepsH = false;

  static FASTATTN_INLINE CellOut forward(const CellIn& in, bool) {
    const vf i = sigmoid<kGrade>(in.x[0] + in.a[0]).y, f = carrying_gate<kGrade>(in.x[1] + in.a[1]);
    const vf g = tanh_of<kGrade>(in.x[2] + in.a[2]), o = sigmoid<kGrade>(in.x[3] + in.a[3]).y;
    const vf c = fma(f, in.c, i * g);
    return {o * tanh_of<kGrade>(c), c, {i, f, g, o}};
  }

  static FASTATTN_INLINE CellGradOut backward(const CellGradIn& in, bool) {
    const vf i = in.saved[0], f = in.saved[1], g = in.saved[2], o = in.saved[3];
    const vf tc = tanh_of<kGrade>(in.c);
    const vf dc = fma(in.dh * o, 1.f - tc * tc, in.dc);
    return {{dc * g * (i * (1.f - i)), dc * in.c_old * (f * (1.f - f)), dc * i * (1.f - g * g),
             in.dh * tc * (o * (1.f - o))},
            vf{},
            dc * f,
            vf{}};
  }

  // What the projection is given, again.
  static FASTATTN_INLINE vf hidden(vf o, vf c) { return o * tanh_of<kGrade>(c); }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
