#define FASTATTN_ISA avx512
#define FASTATTN_LEVEL 2
#if defined(__x86_64__)
#include "attention_kv_cache.h"
#include "target_begin.h"

#include "attention_kv_cache_isa.h"

#include "target_end.h"
#endif
