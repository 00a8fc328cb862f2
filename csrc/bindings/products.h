// Matrix products by the library, in the dtype that it multiplies fastest.
//
// Where 16-bit floats are multiplied more slowly than fp32 (isa.h says on which CPUs), large enough
// operands are widened block by block into fp32 scratch, multiplied there and rounded once: the
// same sums in fp32 as the library's, of the same values.
#pragma once

#include "row_args.h"

namespace fastattn::binding {

// out = a b, a (M, K), b (K, N) and out (M, N) of one dtype; any strides. Returns
// out.
Tensor product(const Tensor& a, const Tensor& b, const Tensor& out);

// x w^T + bias, x (..., K), w (N, K).
Tensor linear(const Tensor& x, const Tensor& w, const Opt& bias);

}  // namespace fastattn::binding
