#define FASTATTN_ISA portable
#define FASTATTN_LEVEL 0

#include "target_begin.h"

#include "attention_isa.h"

#include "target_end.h"
