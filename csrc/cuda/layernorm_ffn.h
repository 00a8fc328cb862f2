// LayerNorm + FFN in one kernel on NVIDIA GPUs (sm_80 and newer): the torch-free interface.
//
//   u = W1 norm(x) + b1,  a = hidden_dropout(act(u))  or gated  hidden_dropout(act(g) u) with
//   g = Wg norm(x) + bg;   z = dropout(W2 a + b2);   y = x + z  or  norm(x + z)
//
// M rows (tokens), D columns of x, Dout of y (D where there is a residual), F hidden units; weights
// as nn.Linear stores them, w1 and w_gate (F, D), w2 (Dout, F). The caller owns every pointer;
// kernels write only what the comments call results, and all of each. The seed is read on the
// device. u, g and a never leave registers: the backward makes them again.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../operands.h"
#include "variant.h"

namespace fastattn::cuda {

// The widest D and Dout that the kernels serve.
constexpr int kMaxFfnWidth = 256;

// Numbered as the op's arguments are.
enum class Norm : int { kNone = 0, kLayer = 1, kRms = 2 };
enum class Act : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kRelu2 = 3, kSilu = 4 };

struct Matrix {  // rows of unit stride; ptr null = absent
  void* ptr = nullptr;
  DType dtype = DType::kF32;
  int64_t stride = 0;  // between rows, elements
};

struct Parameter {  // contiguous; ptr null = absent
  const void* ptr = nullptr;
  DType dtype = DType::kF32;
};

struct LayerNormFfnParams {
  int64_t M = 0;
  int D = 0, F = 0, Dout = 0;
  DType dtype = DType::kF32;  // of the weights and the products
  Matrix x;                   // (M, D), in `dtype` or fp32, as y is
  Matrix w1, w_gate, w2;      // w_gate present = gated
  Parameter b1, b_gate, b2;   // (F,), (F,), (Dout,)
  Norm norm = Norm::kNone;
  bool pre_norm = true;          // the norm is of x, else of the result
  Parameter norm_weight, shift;  // of the norm's width
  float eps = 0.f;
  Act act = Act::kGelu;
  bool residual = true;
  double dropout_p = 0., hidden_dropout_p = 0.;
  const int64_t* seed = nullptr;  // one element; null without dropout

  Matrix y;  // result (M, Dout)
  // What the backward wants of a norm: its input (results; pre_norm: x is it, s stays null) and
  // (M,) statistics; null = not wanted. rms has no mean. The backward reads them.
  Matrix s;
  float *mean = nullptr, *rstd = nullptr;

  // F in that many parts, by blocks of their own; more than 1: their sums go to `partials`,
  // (splits, M, layernorm_ffn_stride(Dout)) of scratch, and a second kernel ends the rows.
  int splits = 1;
  float* partials = nullptr;
};

// Upstream gradient, results (null = not wanted) and scratch of the backward.
struct LayerNormFfnGrads {
  Matrix dy;  // (M, Dout), in x's dtype
  Matrix dx;
  void *dw1 = nullptr, *dw_gate = nullptr, *dw2 = nullptr;  // contiguous, in `dtype`
  float *db1 = nullptr, *db_gate = nullptr, *db2 = nullptr;
  float *dnorm_weight = nullptr, *dshift = nullptr;

  // Scratch, of as many elements as LayerNormFfnScratch says: norm(x) and the gradient of the
  // second product, in `dtype`; sums over parts of the rows.
  void *xn = nullptr, *dz = nullptr;
  float *row_sums = nullptr, *weight_sums = nullptr;
  int chunks = 1;  // parts of the rows in the sums of dw1, dw_gate and dw2
};

// How many elements of scratch a backward wants.
struct LayerNormFfnScratch {
  int64_t xn = 0, dz = 0, row_sums = 0, weight_sums = 0;
};

// Elements of a row of `partials`: 16-byte accesses whatever Dout is.
constexpr int layernorm_ffn_stride(int Dout) { return (Dout + 3) / 4 * 4; }

// How many parts F is cut into so that few rows keep a GPU of that many multiprocessors busy.
int layernorm_ffn_splits(const LayerNormFfnParams& p, int multiprocessors);
// y, s, mean, rstd. D, Dout in [1, kMaxFfnWidth], checked by the caller.
Launch layernorm_ffn_forward(const LayerNormFfnParams& p, cudaStream_t stream);

// Into how many parts the backward's rows are cut, and what it then wants of scratch.
int layernorm_ffn_chunks(const LayerNormFfnParams& p, const LayerNormFfnGrads& g,
                         int multiprocessors);
LayerNormFfnScratch layernorm_ffn_scratch(const LayerNormFfnParams& p, const LayerNormFfnGrads& g);
// The gradients. Several launches; returns the last, or the first that failed. Bitwise repeatable
// for the same `chunks`.
Launch layernorm_ffn_backward(const LayerNormFfnParams& p, const LayerNormFfnGrads& g,
                              cudaStream_t stream);

// Writes up to `capacity` entries and returns how many there are.
int layernorm_ffn_forward_variants(VariantInfo* out, int capacity);
int layernorm_ffn_backward_variants(VariantInfo* out, int capacity);

}  // namespace fastattn::cuda
