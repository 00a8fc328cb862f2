#define FASTATTN_ISA amx
#define FASTATTN_LEVEL 3
#if defined(__x86_64__)
#include "layernorm_ffn.h"
#include "recurrent.h"
#include "recurrent_step.h"
#include "team.h"
#include "target_begin.h"

#include "recurrent_isa.h"

#include "target_end.h"
#endif
