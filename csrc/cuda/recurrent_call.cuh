// A call of the recurrence as its blocks see it: which units, sequences and rows are theirs, and
// where blocks leave for each other what the next product reads.
#pragma once

#include "grid_barrier.cuh"
#include "recurrent_cells.cuh"
#include "recurrent_product.cuh"

namespace fastattn::cuda {

struct RecurrentCall {
  RecurrentParams p;
  RecurrentGrads g;
  int slices, rows, groups;  // RecurrentPlan's
  int first = 0;             // direction of the first block
  int columns;               // of a row of the product: P, backward G H
  int chunks, pitch;         // of a row of the exchange: chunks there are, bytes from row to row
  unsigned char* barriers;   // one a group
  unsigned char* exchange;   // (2, D, B, pitch), zeros at the start; kBlock: none
  float *h, *c;              // carried: (D, B, H)
};

// The part of a launch that a block has: hidden units [unit, unit + kUnits) of a direction, for the
// sequences [lo, hi).
struct Place {
  int d, slice, unit, lo, hi, group;

  __device__ Place(const RecurrentCall& c, int units) {
    const int block = int(blockIdx.x);
    slice = block % c.slices;
    const int in_direction = block / c.slices % c.groups;
    d = c.first + block / c.slices / c.groups;
    group = d * c.groups + in_direction;
    unit = slice * units;
    lo = in_direction * c.rows;
    hi = min(lo + c.rows, c.p.B);
  }
};

// Rows of gx and y of one step: n sequences have one, from `first` on. Offsets are anybody's.
struct StepRows {
  int64_t first = 0;
  int n = 0;

  __device__ StepRows() {}
  __device__ StepRows(const RecurrentParams& p, int t) {
    if (p.offsets) {
      first = min(max(p.offsets[t], int64_t(0)), p.N);
      const int64_t there = p.offsets[t + 1] - first, room = min(int64_t(p.B), p.N - first);
      n = int(min(max(there, int64_t(0)), room));
    } else {
      first = int64_t(t) * p.B, n = p.B;
    }
  }
};

// The j-th step that a direction makes.
__device__ __forceinline__ int time_of(const RecurrentParams& p, int d, int j) {
  return p.reverse >> d & 1 ? p.T - 1 - j : j;
}

// Whether sequence b has step t, whose rows are n.
__device__ __forceinline__ bool has_step(const RecurrentParams& p, int b, int t, int n) {
  if (b >= n) return false;
  if (!p.lengths) return true;
  return p.wide_lengths ? static_cast<const int64_t*>(p.lengths)[b] > t
                        : static_cast<const int*>(p.lengths)[b] > t;
}

// What the next product reads: rows of sequences from Place::lo on, in two buffers, so that one
// barrier a step is enough. Who writes the one of step s + 1 has met all who read it in s - 1.
template <class G>
struct Exchange {
  using T = typename G::T;
  unsigned char* base;
  int64_t buffer;
  int pitch;

  __device__ Exchange(const RecurrentCall& c, const Place& at, unsigned char* s_exchange)
      : pitch(c.pitch) {
    if constexpr (G::kAlone) {
      base = s_exchange, buffer = int64_t(G::kBatch) * pitch;
    } else {
      buffer = int64_t(c.p.D) * c.p.B * pitch;
      base = c.exchange + (int64_t(at.d) * c.p.B + at.lo) * pitch;
    }
  }
  __device__ __forceinline__ const unsigned char* row(int which, int b) const {
    return base + which * buffer + int64_t(b) * pitch;
  }
  __device__ __forceinline__ void write(int which, int b, int column, float value) const {
    reinterpret_cast<T*>(base + which * buffer + int64_t(b) * pitch)[column] = T(value);
  }
};

template <typename T>
__device__ __forceinline__ float load(const void* x, int64_t at) {
  return float(static_cast<const T*>(x)[at]);
}
template <typename T>
__device__ __forceinline__ void store(void* x, int64_t at, float value) {
  static_cast<T*>(x)[at] = T(value);
}

// h_mask's factor of one element, from its index in (D, B, P).
template <typename T>
__device__ __forceinline__ float masked(const RecurrentParams& p, int64_t at, float x) {
  return p.h_mask ? x * load<T>(p.h_mask, at) : x;
}

// What a backward reads of one element and step.
template <class Cell, typename T>
__device__ __forceinline__ void load_saved(CellSaved& s, const RecurrentParams& p, int d, int b,
                                           int unit, const StepRows& rows, const StepRows& before,
                                           int t_before) {
  const int64_t row = int64_t(d) * p.N + rows.first + b;
  const int64_t row_before = int64_t(d) * p.N + before.first + b;
  const int64_t state = (int64_t(d) * p.B + b) * p.H + unit;
  const bool began = t_before >= 0 && has_step(p, b, t_before, before.n);
#pragma unroll
  for (int k = 0; k < Cell::kSaved; ++k) s.gate[k] = load<T>(p.gates, (row * 4 + k) * p.H + unit);
  if (Cell::kHasC) {
    s.c = load<T>(p.cells, row * p.H + unit);
    s.c_before = began ? load<T>(p.cells, row_before * p.H + unit) : load<T>(p.c0, state);
  }
  if (Cell::kReadsY) s.y = load<T>(p.y, ((rows.first + b) * p.D + d) * p.P + unit);
  if (Cell::kReadsH)
    s.h_before =
        began ? load<T>(p.y, ((before.first + b) * p.D + d) * p.P + unit) : load<T>(p.h0, state);
}

}  // namespace fastattn::cuda
