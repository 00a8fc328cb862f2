#define FASTATTN_ISA portable
#define FASTATTN_LEVEL 0
#include "attention_kv_cache.h"
#include "target_begin.h"

#include "attention_kv_cache_isa.h"

#include "target_end.h"
