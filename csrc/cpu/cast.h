// bf16 matrices as fp32 ones and back: the torch-free interface.
#pragma once

#include "layernorm_ffn.h"

namespace fastattn {

// y = x + bias: bf16 from fp32, or fp32 from bf16. Elements of y are written once, and nothing
// else.
struct CastParams {
  int64_t M = 0, N = 0;
  Rows x;
  Vec bias;  // (N,), may be absent
  Rows y;    // result
};

void cast_rows(const CastParams& p, const Parallel& parallel);

FASTATTN_IN_EVERY_ISA(void cast_rows(const CastParams& p, const Parallel& parallel);)

}  // namespace fastattn
