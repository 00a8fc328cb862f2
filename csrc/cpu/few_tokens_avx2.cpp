#define FASTATTN_ISA avx2
#define FASTATTN_LEVEL 1
#if defined(__x86_64__)
#include "few_tokens.h"
#include "target_begin.h"

#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "rows.h"
#include "activation.h"
#include "few_tokens_rows.h"

#include "target_end.h"
#endif
