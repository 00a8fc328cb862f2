// Embedding on the CPU: the torch-free interface.
//
//   s = scale E[id] + P[position] + T[segment],  y = dropout(norm(s) weight + shift)
//
// M tokens, N features; up to three tables. Forward: rows are gathered into fp32 and go through the
// norm pass of layernorm_ffn.h, and once more without a norm for the dropout, some rows at a time
// so that s stays in L1. Backward: s is gathered again, ds comes from the same passes, and each
// table's gradient is a sum of rows of ds by index: tokens are put in order of their index by a
// counting sort, and every row of the gradient is written once, by one worker, in token order. No
// atomics; the thread count cannot be seen in the bits. Sums are fp32, in parts of kPart tokens,
// whatever the table's dtype.
//
// FLOPs: few. Bytes forward: M N of each table and of y; backward: the same, 2 M N of ds, and all
// V N of a table's gradient, which is dense: for a small batch, writing zeros is most of the work.
#pragma once

#include "layernorm_ffn.h"

namespace fastattn {

// Which row of a table token m takes: index[m % period], or start + m % period without an index.
struct Index {
  const void* ptr = nullptr;
  bool wide = true;  // int64, else int32
  int64_t period = 1, start = 0;

  int64_t operator[](int64_t m) const {
    const int64_t i = m % period;
    if (!ptr) return start + i;
    return wide ? static_cast<const int64_t*>(ptr)[i] : static_cast<const int32_t*>(ptr)[i];
  }
};

struct Table {
  Rows rows;  // (V, N); ptr null = absent
  int64_t V = 0;
  Index index;
  float scale = 1.f;
};

inline constexpr int kTables = 3;  // words, positions, segments

struct EmbeddingParams {
  int64_t M = 0, N = 0;
  Table table[kTables];
  Norm norm = Norm::kNone;
  Vec weight, shift;
  float eps = 0.f;
  DropoutSite dropout;
  Rows y;                                  // result
  float *mean = nullptr, *rstd = nullptr;  // (M,) results, may be null
};

// The gradient of one table.
struct TableGrad {
  Rows d;                 // (V, N) result, may be absent
  int64_t skip = -1;      // this row gets zeros (padding_idx); -1 = none
  bool by_count = false;  // a row is divided by how many tokens took it
};

struct EmbeddingGrads {
  Rows dy;
  const float *mean = nullptr, *rstd = nullptr;  // the forward's
  TableGrad table[kTables];
  float *dweight = nullptr, *dshift = nullptr;  // (N,) results, may be null
};

// The first token whose index lies outside its table, with the table and the index; token < 0 where
// all are inside.
struct OutOfRange {
  int64_t token = -1;
  int table = 0;
  int64_t index = 0;
};
OutOfRange embedding_check(const EmbeddingParams& p);

// Both read indices that embedding_check has passed. p of the backward is that of the forward; its
// y is not used.
void embedding_forward(const EmbeddingParams& p, const Parallel& parallel);
void embedding_backward(const EmbeddingParams& p, const EmbeddingGrads& g,
                        const Parallel& parallel);

// The tokens of one row of a gradient: order[begin..end).
struct Run {
  int64_t row, begin, end;
};

FASTATTN_IN_EVERY_ISA(void embedding_gather(const EmbeddingParams& p, int64_t m0, int64_t m1,
                                            const Rows& out);
                      void embedding_sum(const Rows& ds, int64_t c0, int64_t c1,
                                         const int64_t* order, const Run& run, float scale,
                                         const Rows& out);)

}  // namespace fastattn
