// Backward of the recurrence by blocks that keep their columns of W_hh: one launch for all steps.
//
//   for every step, from the last:  dh = W_hh^T dgh of the step after, + what went past W_hh, + dy
//                                   cell backward; dgx, and dgh to the exchange
//                                   all blocks of the group meet
//   dh0, dc0
//
// A step is 2 B G H P FLOPs as the forward's, but what blocks read of each other is G times as
// wide, B G H elements. Gates are as the forward saved them, in the dtype; dh and dc are carried in
// fp32; dgh is rounded to the dtype where a product reads it. No sum has two owners: bitwise
// repeatable.
#pragma once

#include "recurrent_fwd.cuh"

namespace fastattn::cuda {

template <class C>
__device__ __forceinline__ void recurrent_backward_block(const RecurrentCall& c) {
  using T = typename C::T;
  using Cell = typename C::Cell;
  using G = Geometry<T, 1, C::kUnits>;
  constexpr int kGates = Cell::kGates;
  FASTATTN_DYNAMIC_SHARED(s_all);
  const RecurrentParams& p = c.p;
  const RecurrentGrads& g = c.g;
  const Place at(c, G::kUnits);
  const RecurrentShared<G> shared(s_all, c);
  const Exchange<G> exchange(c, at, shared.exchange);
  const T* const w_hh = static_cast<const T*>(p.w_hh[at.d]);
  const ResidentWeights<G> weights(
      shared.weights, c.chunks, p.H - at.unit, [&](int, int row, int column) {
        const int unit = at.unit + row;
        return unit < p.H && column < c.columns ? w_hh[int64_t(column) * p.P + unit] : T(0.f);
      });
  GridBarrier barrier(c.barriers, at.group, c.slices);
  const Mine<G> mine;
  const int unit = at.unit + mine.unit;
  for (int b = at.lo + mine.first; unit < p.H && b < at.hi; b += G::kStep) {
    const int64_t i = (int64_t(at.d) * p.B + b) * p.H + unit;
    c.h[i] = g.dh_n ? load<T>(g.dh_n, i) : 0.f;
    if (Cell::kHasC) c.c[i] = g.dc_n ? load<T>(g.dc_n, i) : 0.f;
  }

  StepRows after;  // of the step that was made last: it comes after this one
  int t_after = -1;
#pragma unroll 1
  for (int s = 0; s <= p.T; ++s) {
    const int j = p.T - 1 - s;
    const int t = j >= 0 ? time_of(p, at.d, j) : -1,
              t_before = j > 0 ? time_of(p, at.d, j - 1) : -1;
    const StepRows rows = j >= 0 ? StepRows(p, t) : StepRows();
    const StepRows before = j > 0 ? StepRows(p, t_before) : StepRows();
#pragma unroll 1
    for (int b0 = at.lo; b0 < min(at.hi, max(rows.n, after.n)); b0 += G::kBatch) {
      CellSaved saved[G::kCells];
      float dy[G::kCells];
      bool here[G::kCells];
#pragma unroll
      for (int i = 0; i < G::kCells; ++i) {  // on their way during the product
        const int b = b0 + mine.first + i * G::kStep;
        here[i] = j >= 0 && unit < p.H && b < at.hi && has_step(p, b, t, rows.n);
        dy[i] = 0.f;
        if (!here[i]) continue;
        load_saved<Cell, T>(saved[i], p, at.d, b, unit, rows, before, t_before);
        if (g.dy) dy[i] = load<T>(g.dy, ((rows.first + b) * p.D + at.d) * p.P + unit);
      }
      if (s > 0) product_of_tile<G>(weights, exchange, s % 2, at, b0, shared.parts);
      __syncthreads();  // the sums of all warps are there
#pragma unroll
      for (int i = 0; i < G::kCells; ++i) {
        const int in_tile = mine.first + i * G::kStep, b = b0 + in_tile;
        if (unit >= p.H || b >= at.hi) continue;
        const int64_t state = (int64_t(at.d) * p.B + b) * p.H + unit;
        const int64_t row = int64_t(at.d) * p.N + rows.first + b;
        float dh = c.h[state];
        // A sequence without the step after has left nothing in the exchange.
        if (s > 0 && has_step(p, b, t_after, after.n))
          dh += masked<T>(p, state, whole_sum<G>(shared.parts, 0, mine.unit, in_tile));
        if (here[i]) {
          CellGrad grad = {};
          float dc = Cell::kHasC ? c.c[state] : 0.f;
          Cell::backward(saved[i], dh + dy[i], p.cell, dc, grad);
#pragma unroll
          for (int k = 0; k < kGates; ++k) {
            store<T>(g.dgx, (row * kGates + k) * p.H + unit, grad.dx[k]);
            exchange.write((s + 1) % 2, b - at.lo, k * p.H + unit, grad.dgh[k]);
          }
          if (g.dghn) store<T>(g.dghn, row * p.H + unit, grad.dgh[2]);
          if (Cell::kHasC) c.c[state] = dc;
          dh = grad.past;
        } else if (b < rows.n) {
#pragma unroll
          for (int k = 0; k < kGates; ++k) store<T>(g.dgx, (row * kGates + k) * p.H + unit, 0.f);
          if (g.dghn) store<T>(g.dghn, row * p.H + unit, 0.f);
        }
        c.h[state] = dh;
      }
      __syncthreads();  // the sums are read
    }
    if (j >= 0) {
      if constexpr (G::kAlone) {
        __syncthreads();  // the block's dgh is there
      } else {
        barrier.meet();
      }
    }
    after = rows, t_after = t;
  }

  if (unit >= p.H) return;
  for (int b = at.lo + mine.first; b < at.hi; b += G::kStep) {
    const int64_t i = (int64_t(at.d) * p.B + b) * p.H + unit;
    store<T>(g.dh0, i, c.h[i]);
    if (Cell::kHasC) store<T>(g.dc0, i, c.c[i]);
  }
}

}  // namespace fastattn::cuda
