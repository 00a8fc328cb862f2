#include "layernorm_ffn.h"

#include "cast.h"
#include "few_tokens.h"
#include "isa.h"
#include "linear_cross_entropy.h"

namespace fastattn {

void norm_forward(const NormParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(norm_forward(p, parallel));
}
void norm_backward(const NormGrads& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(norm_backward(p, parallel));
}
void act_forward(const ActParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(act_forward(p, parallel));
}
void act_backward(const ActGrads& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(act_backward(p, parallel));
}
bool ffn_serves(const FfnParams& p, int threads) { FASTATTN_DISPATCH(ffn_serves(p, threads)); }
void ffn_forward(const FfnParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(ffn_forward(p, parallel));
}

bool few_tokens_serve(int64_t M) { FASTATTN_DISPATCH(few_tokens_serve(M)); }
void few_tokens_products(const FewTokensParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(few_tokens_products(p, parallel));
}
void cast_rows(const CastParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(cast_rows(p, parallel));
}
void cross_entropy(const CrossEntropyParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(cross_entropy(p, parallel));
}

}  // namespace fastattn
