// What the ops of whole layers are made of beside kernels: other ops, called from C++.
#pragma once

#include "dispatcher.h"
#include "products.h"

namespace fastattn::binding {

// A feed-forward block with its norm; without dropout.
struct Ffn {
  Tensor w1, w2;
  Opt b1, b2, norm_weight, norm_bias;
  double eps;
  int64_t act;
  bool pre_norm;
  Norm norm = Norm::kLayer;
  Opt w_gate, b_gate;
};

inline Tensor layernorm_ffn(const Tensor& x, const Ffn& f) {
  using torch::stable::detail::from;
  const Opt none;
  std::array<StableIValue, 18> stack{from(x),
                                     from(f.w1),
                                     from(f.b1),
                                     from(f.w2),
                                     from(f.b2),
                                     from(f.w_gate),
                                     from(f.b_gate),
                                     from(f.norm_weight),
                                     from(f.norm_bias),
                                     from(none),
                                     from(int64_t(f.norm)),
                                     from(f.eps),
                                     from(f.act),
                                     from(f.pre_norm),
                                     from(true),
                                     from(0.),
                                     from(0.),
                                     from<int64_t>(0)};
  call("fastattn::layernorm_ffn_fwd", stack);
  const auto tensor = [&](size_t i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  Tensor y = tensor(0);
  for (size_t i = 1; i < 7; ++i) tensor(i);  // ours to free: what a backward would read
  return y;
}

}  // namespace fastattn::binding
