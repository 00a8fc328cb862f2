#include "few_tokens.h"

#include "isa.h"

namespace fastattn {

#if defined(__x86_64__)
#define FASTATTN_FEW_TOKENS(call) \
  switch (current_isa()) {        \
    case Isa::kAmx:               \
      return amx::call;           \
    case Isa::kAvx512:            \
      return avx512::call;        \
    case Isa::kAvx2:              \
      return avx2::call;          \
    default:                      \
      return portable::call;      \
  }
#else
#define FASTATTN_FEW_TOKENS(call) return portable::call
#endif

bool few_tokens_serve(int64_t M) { FASTATTN_FEW_TOKENS(few_tokens_serve(M)); }

void few_tokens_products(const FewTokensParams& p, const Parallel& parallel) {
  FASTATTN_FEW_TOKENS(few_tokens_products(p, parallel));
}

void few_tokens_ffn(const FewTokensFfn& p, const Parallel& parallel) {
  FASTATTN_FEW_TOKENS(few_tokens_ffn(p, parallel));
}

}  // namespace fastattn
