#define FASTATTN_ISA portable
#define FASTATTN_LEVEL 0

#include "cast.h"
#include "few_tokens.h"
#include "linear_cross_entropy.h"
#include "target_begin.h"

#include "layernorm_ffn_isa.h"

#include "target_end.h"
