// LayerNorm + FFN on the CPU, and its parts on their own: the torch-free interface.
//
//   norm pass:  s = residual + dropout(x + bias),  y = norm(s) * weight + shift
//   act pass:   a = dropout(act(u + bias))  or gated  dropout(act(g + gate_bias) * (u + bias))
//   ffn:        y = act pass(x W1^T) W2^T, before bias, dropout and residual (a norm pass adds
//   them)
//
// M rows (tokens), N columns (features); the FFN maps D features over F hidden ones. Strides are in
// elements, columns have unit stride. The caller owns every pointer; kernels write only what the
// comments call results, and all of each. Statistics and sums are fp32, two-pass, whatever the
// storage; a sum over rows is taken in blocks whose size does not depend on the thread count.
#pragma once

#include <cstdint>

#include "../operands.h"
#include "isa.h"
#include "parallel.h"

namespace fastattn {

struct Rows {  // (M, N); ptr null = absent
  void* ptr = nullptr;
  DType dtype = DType::kF32;
  int64_t stride = 0;
};

struct Vec {  // (N,) contiguous; ptr null = absent
  const void* ptr = nullptr;
  DType dtype = DType::kF32;
};

// Element (i, j) of a site is dropped iff its Philox word < p * 2^32; counter (j >> 2, i, i >> 32,
// site).
struct DropoutSite {
  double p = 0.;  // 0 = off
  uint64_t seed = 0;
  uint32_t site = 0;
  int64_t first_row = 0;  // index of row 0, where the call is a part of a larger one
};

enum class Norm : int { kNone = 0, kLayer = 1, kRms = 2 };
enum class Act : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kRelu2 = 3, kSilu = 4, kIdentity = 5 };

struct NormParams {
  int64_t M = 0, N = 0;
  Rows x, residual;
  Vec bias;
  DropoutSite dropout;
  Rows s;  // result, may be absent; the norm is of s as it is stored
  Norm norm = Norm::kNone;
  Vec weight, shift;
  float eps = 0.f;
  Rows y;                                  // result, may be absent
  float *mean = nullptr, *rstd = nullptr;  // (M,) results, may be null; rms has no mean
};

// ds = dsum + (derivative of norm)(dy), the gradient of s and of residual; dx = dropout * ds.
struct NormGrads {
  int64_t M = 0, N = 0;
  Rows dy, dsum;  // upstream of y and of s; may be absent
  Rows s;         // as the forward normalised it
  const float *mean = nullptr, *rstd = nullptr;
  Norm norm = Norm::kNone;
  Vec weight;
  DropoutSite dropout;
  Rows ds, dx;                                                    // results, may be absent
  float *dweight = nullptr, *dshift = nullptr, *dbias = nullptr;  // (N,) results, may be null
};

struct ActParams {  // u, g and a of one dtype
  int64_t M = 0, N = 0;
  Rows u, g;  // g present = gated
  Vec bias, gate_bias;
  Act act = Act::kGelu;
  DropoutSite dropout;
  Rows a;  // result
};

struct ActGrads {  // all matrices of one dtype
  int64_t M = 0, N = 0;
  Rows u, g, da;
  Vec bias, gate_bias;
  Act act = Act::kGelu;
  DropoutSite dropout;
  Rows du, dg, a;                                 // results; a, the forward's, may be absent
  float *dbias = nullptr, *dgate_bias = nullptr;  // (N,) results, may be null
};

// y = after(act pass(before(x) W1^T) W2^T): `before` and `after` are norm passes over M rows of D
// and of Dout columns. before.x is the input, before.y is not used; after.x is the second product,
// which never exists as a whole. Weights as nn.Linear stores them, of one dtype, any row stride.
struct FfnParams {
  int64_t M = 0, D = 0, F = 0, Dout = 0;
  NormParams before, after;
  Rows w1, w_gate, w2;  // (F, D), (F, D) or absent, (Dout, F)
  Vec b1, b_gate;
  Act act = Act::kGelu;
  DropoutSite dropout;  // of the hidden layer
  Rows u, g, a;  // results, may be absent: pre-activations without bias, and the hidden layer
};

void norm_forward(const NormParams& p, const Parallel& parallel);
void norm_backward(const NormGrads& p, const Parallel& parallel);
void act_forward(const ActParams& p, const Parallel& parallel);
void act_backward(const ActGrads& p, const Parallel& parallel);

// Whether ffn_forward has a kernel that beats the library's GEMM for such a call, on the
// instruction set in use and with so many threads.
bool ffn_serves(const FfnParams& p, int threads);
void ffn_forward(const FfnParams& p, const Parallel& parallel);

// One set of these in each instruction set's namespace; the functions above choose.
FASTATTN_IN_EVERY_ISA(void norm_forward(const NormParams& p, const Parallel& parallel);
                      void norm_backward(const NormGrads& p, const Parallel& parallel);
                      void act_forward(const ActParams& p, const Parallel& parallel);
                      void act_backward(const ActGrads& p, const Parallel& parallel);
                      bool ffn_serves(const FfnParams& p, int threads);
                      void ffn_forward(const FfnParams& p, const Parallel& parallel);)

}  // namespace fastattn
