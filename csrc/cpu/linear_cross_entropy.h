// The loss of a chunk of logits and its gradient, in place: the torch-free interface.
//
//   loss = (1 - s) (lse - l[t]) + s (lse - mean l),   d = scale (e^(l - lse) - (1 - s) [j = t] - s
//   / V)
//
// M rows, V classes, l = logits + bias. Strides are in elements, classes have unit stride. The
// caller owns every pointer. The sum over rows is taken in blocks that the thread count does not
// change.
#pragma once

#include "layernorm_ffn.h"

namespace fastattn {

struct CrossEntropyParams {
  int64_t M = 0, V = 0;
  Rows logits;                      // (M, V); where `gradient`, overwritten by d
  Vec bias;                         // (V,), may be absent
  const int64_t* target = nullptr;  // (M,), each in [0, V)
  float smoothing = 0.f;            // s
  float* loss = nullptr;            // (M,) result, may be null
  bool gradient = false;
  const float* scale = nullptr;  // (M,), null = `share` in every row
  float share = 1.f;
  float* dbias = nullptr;  // (V,) result, may be null
};

void cross_entropy(const CrossEntropyParams& p, const Parallel& parallel);

FASTATTN_IN_EVERY_ISA(void cross_entropy(const CrossEntropyParams& p, const Parallel& parallel);)

}  // namespace fastattn
