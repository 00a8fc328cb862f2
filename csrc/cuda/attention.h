// Fused attention on NVIDIA GPUs (sm_80 and newer): the torch-free interface.
//
//   S = q k^T, logits = features(scale * S), P = softmax(logits), o = dropout(P) v
//
// B batch, H query heads, Hk key/value heads, Sq / Sk rows of q / k, D and Dv head dims. The caller
// owns every pointer; kernels write only o, lse, lse_lo and weights, and all of each that lies in a
// sequence (padded: rows beyond a length as well). Values on the device (lengths, cu_seqlens, seed)
// are read there, never on the host, and clamped so that no access leaves a tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../operands.h"
#include "variant.h"

namespace fastattn::cuda {

// int32 or int64 values on the device; null = absent.
struct Integers {
  const void* ptr = nullptr;
  bool wide = false;  // int64
};

struct AttentionParams {
  int B = 0, H = 0, Hk = 0, D = 0, Dv = 0;
  int Sq = 0, Sk = 0;      // padded: of the tensors; packed: the longest sequence; sum < 2^30
  int64_t Tq = 0, Tk = 0;  // packed: tokens
  DType dtype = DType::kF32;
  Operand q, k, v;
  Operand o;                // unit stride in d
  float* lse = nullptr;     // (B, H, Sq) or packed (H, Tq), contiguous; natural log
  float* lse_lo = nullptr;  // what fp32 lse cannot hold, in log2; same shape

  Integers q_lens, k_lens;  // (B,)
  Integers cu_q, cu_k;      // (B + 1,): present = packed

  Broadcast mask, bias;
  const float* alibi = nullptr;  // slope of (b, h) at alibi[b * alibi_b + h]
  int64_t alibi_b = 0;
  const float* sinks = nullptr;  // (H,)
  float scale = 1.f;
  float softcap = 0.f;  // 0 = off
  Causal causal = Causal::kNone;
  int window_left = -1, window_right = -1;  // -1 = unlimited; at most Sq + Sk
  double dropout_p = 0.;
  const int64_t* seed = nullptr;  // one element

  Weights weights_mode = Weights::kNone;
  Operand weights;  // kFull (B, H, Sq, Sk), kMean (B, Sq, Sk) with h = 0
};

// Where the gradient of a bias is summed; its shape decides, see attention_bwd.cu.
enum class BiasGrad : int { kNone = 0, kStore = 1, kKeys = 2, kRows = 3, kShared = 4 };

// Upstream gradients, results (null = not wanted) and scratch of the backward. Every result is
// written in full; packed: the caller zeroes dq, dk and dv, for tokens of no sequence.
struct AttentionGrads {
  Operand d_o;       // of o, any strides; null = 0
  Operand dlse;      // of lse, fp32 (b, h, s); null = 0
  Operand dweights;  // of the weights, in q's dtype: rows s, keys d; kMean: h = 0; null = 0
  float dweights_scale = 1.f;  // kMean: 1 / H
  Operand dq, dk, dv;          // in q's dtype

  BiasGrad dbias_mode = BiasGrad::kNone;
  void* dbias = nullptr;            // zeroed by the caller, but for kShared without dq_sums
  DType dbias_dtype = DType::kF32;  // kKeys, kRows, and kShared with dq_sums: fp32
  int64_t dbias_b = 0, dbias_h = 0, dbias_i = 0, dbias_j = 0;  // its strides, 0 = broadcast
  int bias_b = 1, bias_h = 1;  // kShared: the bias has B and H, or 1, of these

  float* dsinks = nullptr;  // (H,)

  float *delta = nullptr, *lse_units = nullptr;  // scratch of lse's shape; see attention_bwd.cu
  // Packed: the caller fills lse_units with +inf, for tokens of no sequence.
  // Scratch (B, H, Sq, D) or (H, Tq, D), zeroed by the caller: dq (and kRows, kShared) by atomics,
  // two products less and no bitwise repeatability. Null = no atomics. Wants dq and dk or dv.
  float* dq_sums = nullptr;
};

// The widest head dim that the kernels serve.
constexpr int kMaxHeadDim = 256;

// o, lse, lse_lo. D, Dv in [1, kMaxHeadDim], checked by the caller.
Launch attention_forward(const AttentionParams& p, cudaStream_t stream);
// weights, from the lse and lse_lo of attention_forward; every element is written.
Launch attention_weights(const AttentionParams& p, cudaStream_t stream);
// The gradients, from o (needed where d_o is given), lse and lse_lo of attention_forward. Several
// launches; returns the last, or the first that failed.
Launch attention_backward(const AttentionParams& p, const AttentionGrads& g, cudaStream_t stream);

// Writes up to `capacity` entries and returns how many there are.
int attention_forward_variants(VariantInfo* out, int capacity);
int attention_weights_variants(VariantInfo* out, int capacity);
int attention_backward_variants(VariantInfo* out, int capacity);

}  // namespace fastattn::cuda
