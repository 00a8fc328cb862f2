// Activations and their derivatives, on fp32 numbers in registers.
#pragma once

#include "layernorm_ffn.h"
#include "ptx.cuh"

namespace fastattn::cuda {

struct Value {
  float y, dy;
};

// 1 / (1 + e^-x). __fdividef is good to 2 ulp and 0 beyond 2^126, where the result is below fp32's
// normal numbers.
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.f, 1.f + ptx::exp2_approx(x * -1.4426950408889634f));
}

// The normal distribution's Phi(x) and e^(-x^2 / 2). Upper tail: e^(-a^2 / 2) R(1 / (1 + p a)),
// a = |x|, R as in csrc/cpu/activation.h: relative error 3.2e-8, so that Phi keeps its digits in
// the lower tail, where 1 + erf would cancel.
__device__ __forceinline__ float normal(float x, float& bell) {
  const float t = __fdividef(1.f, fmaf(0.35f, fabsf(x), 1.f));
  float r = -0.02915624901652336f;
  r = fmaf(r, t, 0.14402349293231964f);
  r = fmaf(r, t, -0.2558247447013855f);
  r = fmaf(r, t, 0.1593046486377716f);
  r = fmaf(r, t, -0.023202842101454735f);
  r = fmaf(r, t, 0.10554882884025574f);
  r = fmaf(r, t, 0.11982212960720062f);
  r = fmaf(r, t, 0.13986341655254364f);
  r = fmaf(r, t, 0.1396213173866272f);
  bell = ptx::exp2_approx(x * x * -0.7213475204444817f);  // -log2(e) / 2
  const float tail = bell * (r * t);
  return x < 0.f ? tail : 1.f - tail;
}

constexpr float kTanhSlope = 1.5957691216057308f;  // 2 sqrt(2 / pi): (1 + tanh z) / 2 = sigmoid(2z)
constexpr float kTanhCubic = kTanhSlope * 0.044715f;

template <Act kAct>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kAct == Act::kGelu) {
    float bell;
    return x * normal(x, bell);
  } else if constexpr (kAct == Act::kGeluTanh) {
    return x * sigmoid(x * fmaf(x * x, kTanhCubic, kTanhSlope));
  } else if constexpr (kAct == Act::kSilu) {
    return x * sigmoid(x);
  } else {
    const float y = x < 0.f ? 0.f : x;  // a NaN passes
    return kAct == Act::kRelu2 ? y * y : y;
  }
}

template <Act kAct>
__device__ __forceinline__ Value activate_grad(float x) {
  if constexpr (kAct == Act::kGelu) {
    float bell;
    const float phi = normal(x, bell);
    return {x * phi, fmaf(x * 0.3989422804014327f, bell, phi)};
  } else if constexpr (kAct == Act::kGeluTanh) {
    const float s = sigmoid(x * fmaf(x * x, kTanhCubic, kTanhSlope)), slope = s * (1.f - s);
    // 0 * inf at the far ends, where the slope is 0 for good.
    return {x * s,
            slope == 0.f ? s : fmaf(x * slope, fmaf(x * x, 3.f * kTanhCubic, kTanhSlope), s)};
  } else if constexpr (kAct == Act::kSilu) {
    const float s = sigmoid(x), slope = s * (1.f - s);
    return {x * s, slope == 0.f ? s : fmaf(x, slope, s)};
  } else {
    const float y = x < 0.f ? 0.f : x;
    if constexpr (kAct == Act::kRelu2) return {y * y, 2.f * y};
    return {y, x > 0.f ? 1.f : 0.f};
  }
}

template <Act kAct>
struct ActType {
  static constexpr Act value = kAct;
};

// f(the activation as a type) for a run-time one, which all threads share.
template <class F>
__device__ __forceinline__ void with_act(Act act, F&& f) {
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
  }
}

}  // namespace fastattn::cuda
