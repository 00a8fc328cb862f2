#define FASTATTN_ISA portable
#define FASTATTN_LEVEL 0
#include "embedding.h"
#include "target_begin.h"

#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "rows.h"
#include "embedding_rows.h"

#include "target_end.h"
