#define FASTATTN_ISA amx
#define FASTATTN_LEVEL 3
#if defined(__x86_64__)
#include "target_begin.h"

#include "attention_isa.h"

#include "target_end.h"
#endif
