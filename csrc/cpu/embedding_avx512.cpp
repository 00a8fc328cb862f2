#define FASTATTN_ISA avx512
#define FASTATTN_LEVEL 2
#if defined(__x86_64__)
#include "embedding.h"
#include "target_begin.h"

#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "rows.h"
#include "embedding_rows.h"

#include "target_end.h"
#endif
