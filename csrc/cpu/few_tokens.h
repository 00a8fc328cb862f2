// Products of a few tokens with large weights, fp32: the torch-free interface.
//
//   y_i = x W_i^T
//
// Tokens are the lanes: x is packed once as x^T, 16 tokens a vector, and an element of W, broadcast
// from where it lies, multiplies a vector of them. So W is read once, in order, and needs no
// packing, which is what a library's GEMM spends most of its time on here. The FFN of a few tokens
// (ffn_few_tokens.h) is made of the same products. FLOPs 2 M N K; bytes: W. Bound by reading W from
// beyond L2. Measured at M = 16, N = K = 384, W in L3, one thread of a busy machine: 83 us against
// MKL's 157 us; 1536 x 384: 219 us against 393 us.
//
// The caller owns every pointer. Each result is computed by one worker in one order, whatever the
// thread count.
#pragma once

#include "layernorm_ffn.h"

namespace fastattn {

struct Product {
  Rows w;  // (N, K) fp32
  int64_t N = 0;
  Rows y;  // (M, N) fp32 result
};

struct FewTokensParams {
  int64_t M = 0, K = 0;
  Rows x;  // (M, K) fp32
  const Product* products = nullptr;
  int count = 0;
};

// Whether M tokens are few enough to beat the library on the instruction set in use.
bool few_tokens_serve(int64_t M);
void few_tokens_products(const FewTokensParams& p, const Parallel& parallel);

FASTATTN_IN_EVERY_ISA(bool few_tokens_serve(int64_t M);
                      void few_tokens_products(const FewTokensParams& p, const Parallel& parallel);)

}  // namespace fastattn
