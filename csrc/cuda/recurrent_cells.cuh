// The cells of the recurrence, on fp32 numbers in registers, forward and backward; for the kernels
// that keep W_hh resident and for those of one step.
//
// gh = W_hh h is of the gates in their order. A backward takes dh, the gradient of the new h, and
// gives dx, that of gx, dgh, that of gh (both per gate), and what goes to the former h past W_hh.
#pragma once

#include "activation.cuh"
#include "recurrent.h"

namespace fastattn::cuda {

struct CellState {
  float h, c;
};
// What the forward saved of one element, of the step and of the sequence's step before.
struct CellSaved {
  float gate[4], c, y, c_before, h_before;
};
struct CellGrad {
  float dx[4], dgh[4], past;
};

// Hochreiter and Schmidhuber, 1997, with forget gate.
struct LstmCell {
  static constexpr const char *kForward = "lstm_fwd_kernel", *kBackward = "lstm_bwd_kernel";
  static constexpr int kGates = 4, kSaved = 4;
  static constexpr bool kHasC = true, kReadsH = false, kReadsY = false;

  __device__ static void forward(const float (&x)[4], const float (&gh)[4], float, Cell,
                                 CellState& s, float (&saved)[4]) {
    const float i = sigmoid(x[0] + gh[0]), f = sigmoid(x[1] + gh[1]);
    const float g = tanhf(x[2] + gh[2]), o = sigmoid(x[3] + gh[3]);
    s.c = fmaf(f, s.c, i * g);
    s.h = o * tanhf(s.c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }
  // dc: of the new c, then of the former.
  __device__ static void backward(const CellSaved& s, float dh, Cell, float& dc, CellGrad& out) {
    const float i = s.gate[0], f = s.gate[1], g = s.gate[2], o = s.gate[3], tanh_c = tanhf(s.c);
    dc = fmaf(dh * o, 1.f - tanh_c * tanh_c, dc);
    out.dx[0] = dc * g * i * (1.f - i), out.dx[1] = dc * s.c_before * f * (1.f - f);
    out.dx[2] = dc * i * (1.f - g * g), out.dx[3] = dh * tanh_c * o * (1.f - o);
    dc *= f;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.dgh[k] = out.dx[k];
    out.past = 0.f;
  }
};

// Cho, 2014, in cuDNN's form: r multiplies W_hn h + b_hn.
struct GruCell {
  static constexpr const char *kForward = "gru_fwd_kernel", *kBackward = "gru_bwd_kernel";
  static constexpr int kGates = 3, kSaved = 4;
  static constexpr bool kHasC = false, kReadsH = true, kReadsY = false;

  __device__ static void forward(const float (&x)[4], const float (&gh)[4], float b_hn, Cell,
                                 CellState& s, float (&saved)[4]) {
    const float r = sigmoid(x[0] + gh[0]), z = sigmoid(x[1] + gh[1]), hn = gh[2] + b_hn;
    const float n = tanhf(fmaf(r, hn, x[2]));
    s.h = fmaf(z, s.h - n, n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = hn;
  }
  __device__ static void backward(const CellSaved& s, float dh, Cell, float&, CellGrad& out) {
    const float r = s.gate[0], z = s.gate[1], n = s.gate[2], hn = s.gate[3];
    const float dn = dh * (1.f - z) * (1.f - n * n);
    out.dx[0] = dn * hn * r * (1.f - r), out.dx[1] = dh * (s.h_before - n) * z * (1.f - z);
    out.dx[2] = dn;
    out.dgh[0] = out.dx[0], out.dgh[1] = out.dx[1], out.dgh[2] = dn * r;
    out.past = dh * z;
  }
};

struct RnnCell {
  static constexpr const char *kForward = "rnn_fwd_kernel", *kBackward = "rnn_bwd_kernel";
  static constexpr int kGates = 1, kSaved = 0;
  static constexpr bool kHasC = false, kReadsH = false, kReadsY = true;

  __device__ static void forward(const float (&x)[4], const float (&gh)[4], float, Cell cell,
                                 CellState& s, float (&)[4]) {
    const float a = x[0] + gh[0];
    s.h = cell == Cell::kRnnTanh ? tanhf(a) : a < 0.f ? 0.f : a;  // a NaN passes
  }
  __device__ static void backward(const CellSaved& s, float dh, Cell cell, float&, CellGrad& out) {
    const float slope = cell == Cell::kRnnTanh ? 1.f - s.y * s.y : s.y > 0.f ? 1.f : 0.f;
    out.dx[0] = out.dgh[0] = dh * slope;
    out.past = 0.f;
  }
};

}  // namespace fastattn::cuda
