// Fused attention on the CPU: the torch-free interface.
//
//   S = q k^T, logits = features(scale * S), P = softmax(logits), o = dropout(P) v
//
// B batch, H query heads, Hk key/value heads, Sq / Sk rows of q / k, D and Dv head dims. Strides
// are in elements. The caller owns every pointer; kernels write only o, lse, lse_lo, weights and
// the d* results, and all of each. No call allocates anything of size Sq * Sk.
#pragma once

#include <cstdint>

#include "../operands.h"
#include "isa.h"
#include "parallel.h"

namespace fastattn {

struct AttentionParams {
  int64_t B = 0, H = 0, Hk = 0, D = 0, Dv = 0;
  int64_t Sq = 0, Sk = 0;  // padded: of the tensors; packed: the longest sequence
  DType dtype = DType::kF32;
  Operand q, k, v;
  Operand o;                // unit stride in d
  float* lse = nullptr;     // natural log
  float* lse_lo = nullptr;  // what fp32 lse cannot hold, in log2 (see RowProb)
  int64_t lse_b = 0, lse_h = 0, lse_s = 0;

  // One per batch entry; null = all of Sq / Sk, from 0. Checked by the binding.
  const int64_t *q_len = nullptr, *k_len = nullptr;
  const int64_t *q_start = nullptr, *k_start = nullptr;  // packed: first token

  Broadcast mask, bias;
  const float* alibi = nullptr;  // slope of (b, h) at alibi[b * alibi_b + h]
  int64_t alibi_b = 0;
  const float* sinks = nullptr;  // (H,)
  float scale = 1.f;
  float softcap = 0.f;  // 0 = off
  Causal causal = Causal::kNone;
  int64_t window_left = -1, window_right = -1;  // -1 = unlimited
  double dropout_p = 0.;
  uint64_t seed = 0;

  Weights weights_mode = Weights::kNone;
  Operand weights;  // written where asked for: kFull (B, H, Sq, Sk), kMean (B, Sq, Sk) with h = 0
};

struct AttentionGrads {
  Operand d_o;                  // upstream, any strides; null where o is not used
  const float* dlse = nullptr;  // strides of lse; null = 0
  Broadcast dweights;           // upstream of the weights (kMean: h stride 0); null = 0
  float dweights_scale = 1.f;   // kMean: 1 / H
  Operand dq, dk, dv;           // null = not wanted; unit stride in d
  float* dbias = nullptr;       // fp32, zeroed by the caller, own contiguous shape
  int64_t dbias_b = 0, dbias_h = 0, dbias_i = 0, dbias_j = 0;  // its strides, 0 = broadcast
  bool dbias_once = false;  // every element is reached exactly once: stored, need not be zeroed
  float* dsinks = nullptr;  // (H,), zeroed by the caller
};

void attention_forward(const AttentionParams& p, const Parallel& parallel);
void attention_backward(const AttentionParams& p, const AttentionGrads& g,
                        const Parallel& parallel);

// One pair of these in each instruction set's namespace; the functions above choose.
FASTATTN_IN_EVERY_ISA(void attention_forward(const AttentionParams& p, const Parallel& parallel);
                      void attention_backward(const AttentionParams& p, const AttentionGrads& g,
                                              const Parallel& parallel);)

}  // namespace fastattn
