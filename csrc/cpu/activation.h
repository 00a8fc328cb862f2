// Activations and their derivatives, a vector at a time.

namespace fastattn {
namespace FASTATTN_ISA {

struct Value {
  vf y, dy;
};

// kExact: to fp32's last digits. kCoarse: to 1e-4, for values that are rounded to bf16 (2e-3) next.
enum class Grade { kExact, kCoarse };

// Of a finite x in [1, 2^126].
template <Grade kGrade>
FASTATTN_INLINE vf reciprocal(vf x) {
#if FASTATTN_LEVEL >= 2
  // One step of Newton's in place of a division, which takes as long as 16 multiplications.
  const vf r = _mm512_rcp14_ps(x);
  return kGrade == Grade::kCoarse ? r : fma(r, 1.f - x * r, r);
#else
  return 1.f / x;
#endif
}
template <Grade kGrade>
FASTATTN_INLINE vf exponential2(vf x) {
  return exp2v<kGrade == Grade::kExact ? 6 : 4>(x);
}

// 1 / (1 + e^-x) and its derivative; 0 below e^-87, where fp32 has no normal numbers left. The
// derivative is e^-x / (1 + e^-x)^2: from s (1 - s) an ulp of s near 1 would be all of its digits.
template <Grade kGrade = Grade::kExact>
FASTATTN_INLINE Value sigmoid(vf x) {
  const vf v = x * -kLog2e, top = set1(126.f);
  const vf e = exponential2<kGrade>(v > top ? top : v);
  const vf y = reciprocal<kGrade>(1.f + e);
  return {v > top ? vf{} : y, v > top ? vf{} : e * y * y};
}

// The sigmoid of a gate that what is carried from step to step is multiplied by: a coarse one is
// 3e-5 off where it is 1, which the next step takes off again (a state is a tenth less after 4000).
// Here a coarse one is 3e-6 of 1 - s off.
template <Grade kGrade>
FASTATTN_INLINE vf carrying_gate(vf x) {
  const vf v = x * -kLog2e, top = set1(126.f);
  const vf y = reciprocal<Grade::kExact>(1.f + exponential2<kGrade>(v > top ? top : v));
  return v > top ? vf{} : y;
}

// The normal distribution's Phi(x) and e^(-x^2 / 2). Upper tail: e^(-a^2 / 2) R(1 / (1 + p a)),
// a = |x|, with R the polynomial of least relative error on a in [0, 14.5]: 3.2e-8 (coarse 3.3e-5),
// so Phi keeps its digits in the lower tail, where 1 + erf would cancel. Beyond, the exponential is
// 0.
template <Grade kGrade = Grade::kExact>
FASTATTN_INLINE void normal(vf x, vf* phi, vf* bell) {
  vf a = x < vf{} ? -x : x, r, t;
  a = a < set1(32.f) ? a : set1(32.f);
  if constexpr (kGrade == Grade::kExact) {
    static constexpr float c[] = {
        0.14402349293231964f, -0.2558247447013855f, 0.1593046486377716f,  -0.023202842101454735f,
        0.10554882884025574f, 0.11982212960720062f, 0.13986341655254364f, 0.1396213173866272f};
    t = reciprocal<kGrade>(1.f + 0.35f * a);
    r = set1(-0.02915624901652336f);
#pragma GCC unroll 8
    for (const float ci : c) r = fma(r, t, set1(ci));
  } else {
    static constexpr float c[] = {0.19956941902637482f, 0.08411483466625214f, 0.1575610488653183f,
                                  0.149079367518425f};
    t = reciprocal<kGrade>(1.f + 0.375f * a);
    r = set1(-0.09032267332077026f);
#pragma GCC unroll 4
    for (const float ci : c) r = fma(r, t, set1(ci));
  }
  *bell = exponential2<kGrade>(x * x * (-0.5f * kLog2e));
  const vf tail = *bell * (r * t);
  *phi = x < vf{} ? tail : 1.f - tail;
}

template <Act kAct, Grade kGrade = Grade::kExact>
FASTATTN_INLINE vf activate(vf x) {
  if constexpr (kAct == Act::kGelu) {
    vf phi, bell;
    normal<kGrade>(x, &phi, &bell);
    return x * phi;
  } else if constexpr (kAct == Act::kGeluTanh) {  // (1 + tanh z) / 2 = sigmoid(2 z)
    return x * sigmoid<kGrade>(
                   x * fma(x * x, set1(2.f * 0.7978845608f * 0.044715f), set1(2.f * 0.7978845608f)))
                   .y;
  } else if constexpr (kAct == Act::kRelu) {
    return x < vf{} ? vf{} : x;  // a NaN passes
  } else if constexpr (kAct == Act::kRelu2) {
    const vf y = x < vf{} ? vf{} : x;
    return y * y;
  } else if constexpr (kAct == Act::kSilu) {
    return x * sigmoid<kGrade>(x).y;
  } else {
    return x;
  }
}

template <Act kAct, Grade kGrade = Grade::kExact>
FASTATTN_INLINE Value activate_grad(vf x) {
  if constexpr (kAct == Act::kGelu) {
    vf phi, bell;
    normal<kGrade>(x, &phi, &bell);
    return {x * phi, fma(x * 0.3989422804f, bell, phi)};
  } else if constexpr (kAct == Act::kGeluTanh) {
    constexpr float k = 2.f * 0.7978845608f;
    const vf x2 = x * x;
    const auto [s, slope] = sigmoid<kGrade>(x * fma(x2, set1(k * 0.044715f), set1(k)));
    const vf dz = fma(x2, set1(3.f * k * 0.044715f), set1(k));
    // 0 * inf at the far ends, where the slope is 0 for good.
    return {x * s, slope == vf{} ? s : fma(x * slope, dz, s)};
  } else if constexpr (kAct == Act::kRelu) {
    return {x < vf{} ? vf{} : x, x > vf{} ? set1(1.f) : vf{}};
  } else if constexpr (kAct == Act::kRelu2) {
    const vf y = x < vf{} ? vf{} : x;
    return {y * y, 2.f * y};
  } else if constexpr (kAct == Act::kSilu) {
    const auto [s, slope] = sigmoid<kGrade>(x);
    return {x * s, slope == vf{} ? s : fma(x, slope, s)};
  } else {
    return {x, set1(1.f)};
  }
}

// f(the activation as a type) for a run-time one.
template <Act kAct>
struct ActType {
  static constexpr Act value = kAct;
};
template <class F>
FASTATTN_INLINE void with_act(Act act, F&& f) {
  switch (act) {
    case Act::kGelu:
      return f(ActType<Act::kGelu>{});
    case Act::kGeluTanh:
      return f(ActType<Act::kGeluTanh>{});
    case Act::kRelu:
      return f(ActType<Act::kRelu>{});
    case Act::kRelu2:
      return f(ActType<Act::kRelu2>{});
    case Act::kSilu:
      return f(ActType<Act::kSilu>{});
    case Act::kIdentity:
      return f(ActType<Act::kIdentity>{});
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
