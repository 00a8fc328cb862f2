#define FASTATTN_ISA portable
#define FASTATTN_LEVEL 0
#include "layernorm_ffn.h"
#include "recurrent.h"
#include "recurrent_step.h"
#include "team.h"
#include "target_begin.h"

#include "recurrent_isa.h"

#include "target_end.h"
