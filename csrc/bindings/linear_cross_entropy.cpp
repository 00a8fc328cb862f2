// torch.ops.fastattn.cross_entropy_ on the CPU: checks, allocation, launch.

#include "../cpu/linear_cross_entropy.h"

#include <tuple>

#include "row_args.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "linear_cross_entropy";

std::tuple<Tensor, Tensor> cross_entropy_(Tensor logits, Opt bias, Tensor target, Opt scale,
                                          double share, double smoothing, int64_t need) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "fastattn::", kOp,
                  ": logits must be (rows, classes), contiguous, got ", text(logits));
  CrossEntropyParams p;
  p.M = logits.size(0), p.V = logits.size(1);
  STD_TORCH_CHECK(p.M > 0 && p.V > 0, "fastattn::", kOp, ": logits must not be empty, got ",
                  text(logits));
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous() &&
                      target.dim() == 1 && target.size(0) == p.M,
                  "fastattn::", kOp, ": target must be (", p.M, ",), int64, contiguous, got ",
                  text(target));
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t m = 0; m < p.M; ++m)
    STD_TORCH_CHECK(p.target[m] >= 0 && p.target[m] < p.V, "fastattn::", kOp,
                    ": target must be in [0, ", p.V, ") or ignore_index, got ", p.target[m]);
  if (scale) {
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
                        scale->numel() == p.M,
                    "fastattn::", kOp, ": scale must be (", p.M, ",), float32, contiguous, got ",
                    text(*scale));
    p.scale = floats(*scale);
  }
  p.logits = rows_of(logits, p.V, row_dtype(kOp, logits, "logits"));
  p.bias = vec(kOp, bias, p.V, "bias");
  p.smoothing = float(smoothing), p.share = float(share);
  p.gradient = need != 0;
  Tensor loss = empty({p.M}, DType::kF32);
  Tensor dbias = bias && (need & 4) ? empty({p.V}, DType::kF32) : nothing();
  p.loss = floats(loss), p.dbias = floats(dbias);
  cross_entropy(p, threads());
  return {loss, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}
