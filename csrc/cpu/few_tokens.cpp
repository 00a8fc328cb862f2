#include "few_tokens.h"

#include "isa.h"

namespace fastattn {

bool few_tokens_serve(int64_t M) { FASTATTN_DISPATCH(few_tokens_serve(M)); }

void few_tokens_products(const FewTokensParams& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(few_tokens_products(p, parallel));
}

void few_tokens_ffn(const FewTokensFfn& p, const Parallel& parallel) {
  FASTATTN_DISPATCH(few_tokens_ffn(p, parallel));
}

}  // namespace fastattn
