#define FASTATTN_ISA avx2
#define FASTATTN_LEVEL 1
#if defined(__x86_64__)
#include "cast.h"
#include "few_tokens.h"
#include "linear_cross_entropy.h"
#include "target_begin.h"

#include "layernorm_ffn_isa.h"

#include "target_end.h"
#endif
