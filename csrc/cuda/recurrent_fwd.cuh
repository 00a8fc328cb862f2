// Forward of the recurrence by blocks that keep W_hh: one launch for all steps (Appleyard, 2016;
// persistent kernels: Diamos, 2016).
//
//   for every step:  gh = W_hh h of the block's units, from the exchange
//                    gates and cell; y, what the backward wants, and the new h to the exchange
//                    all blocks of the group meet
//
// A step is 2 B G H P FLOPs and moves, of a group of B sequences, B P elements of h through L2 to
// each of its blocks; W_hh moves once. What bounds it is the way round: store, barrier, load of h,
// with the product next (2 to 8 warps of m16n8 tiles). Sequences are cut into groups of their own
// blocks where there are more multiprocessors than slices of units. 256 threads, one block a
// multiprocessor: 96 registers a thread and the rest of shared memory are W_hh.
#pragma once

#include "recurrent_call.cuh"
#include "recurrent_cells.cuh"

namespace fastattn::cuda {

// Shared memory: parts of sums, weights, and, of a block that is alone, the exchange.
template <class G>
struct RecurrentShared {
  float* parts;
  unsigned char *exchange, *weights;

  __device__ RecurrentShared(unsigned char* s_all, const RecurrentCall& c) {
    parts = reinterpret_cast<float*>(s_all);
    exchange = s_all + G::kPartBytes;
    weights = exchange;
    if constexpr (G::kAlone) {
      weights += 2 * G::kBatch * c.pitch;
      for (int i = thread_id(); i < 2 * G::kBatch * c.pitch / 16; i += kRecurrentThreads)
        reinterpret_cast<uint4*>(exchange)[i] = make_uint4(0, 0, 0, 0);
      __syncthreads();  // columns that are not there stay 0
    }
  }
};

// A thread's elements in a tile of sequences: one unit, and the first sequence.
template <class G>
struct Mine {
  int unit, first;

  __device__ Mine() : unit(thread_id() % G::kUnits), first(thread_id() / G::kUnits) {
    if (first >= G::kBatch) unit = kNoUnit;
  }
  static constexpr int kNoUnit = 1 << 30;
};

// Sums of the product of a tile of sequences from b0 on, in parts.
template <class G>
__device__ __forceinline__ void product_of_tile(const ResidentWeights<G>& weights,
                                                const Exchange<G>& exchange, int which,
                                                const Place& at, int b0, float* s_parts) {
  if (weights.chunks == 0) return;
  const int g = lane_id() / 4, t = lane_id() % 4, last = at.hi - 1;
  const bool both = b0 + 8 < at.hi;
  // Rows that are not there are read as the last, and nobody reads their sums.
  const unsigned char* rows[G::kN];
#pragma unroll
  for (int n = 0; n < G::kN; ++n)
    rows[n] = exchange.row(which, min(b0 + 8 * n + g, last) - at.lo) + 16 * t;
  float acc[G::kTiles][G::kN][4] = {};
  weights.multiply(acc, rows, both);
  write_part<G>(s_parts, acc, both);
}

// h0 and c0 of the block's elements, carried and, for the first product, in both buffers: sequences
// that join later (packed, reversed) find them in either.
template <class G>
__device__ __forceinline__ void first_state(const RecurrentCall& c, const Place& at,
                                            const Exchange<G>& exchange) {
  using T = typename G::T;
  const RecurrentParams& p = c.p;
  const Mine<G> mine;
  const int unit = at.unit + mine.unit;
  if (unit >= p.H) return;
  for (int b = at.lo + mine.first; b < at.hi; b += G::kStep) {
    const int64_t i = (int64_t(at.d) * p.B + b) * p.H + unit;
    const float h = load<T>(p.h0, i), in = masked<T>(p, i, h);
    c.h[i] = h;
    if (p.c0) c.c[i] = load<T>(p.c0, i);
    exchange.write(0, b - at.lo, unit, in), exchange.write(1, b - at.lo, unit, in);
  }
}

template <class C>
__device__ __forceinline__ void recurrent_forward_block(const RecurrentCall& c) {
  using T = typename C::T;
  using Cell = typename C::Cell;
  using G = Geometry<T, Cell::kGates, C::kUnits>;
  constexpr int kGates = Cell::kGates;
  FASTATTN_DYNAMIC_SHARED(s_all);
  const RecurrentParams& p = c.p;
  const Place at(c, G::kUnits);
  const RecurrentShared<G> shared(s_all, c);
  const Exchange<G> exchange(c, at, shared.exchange);
  const T* const w_hh = static_cast<const T*>(p.w_hh[at.d]);
  const ResidentWeights<G> weights(
      shared.weights, c.chunks, p.H - at.unit, [&](int gate, int row, int column) {
        const int unit = at.unit + row;
        return unit < p.H && column < p.P ? w_hh[(int64_t(gate) * p.H + unit) * p.P + column]
                                          : T(0.f);
      });
  GridBarrier barrier(c.barriers, at.group, c.slices);
  const auto meet = [&] {
    if constexpr (G::kAlone) {
      __syncthreads();  // the block's h is there
    } else {
      barrier.meet();
    }
  };
  first_state<G>(c, at, exchange);
  meet();

  const Mine<G> mine;
  const int unit = at.unit + mine.unit;
  const float b_hn = p.b_hn[at.d] && unit < p.H ? load<T>(p.b_hn[at.d], unit) : 0.f;
#pragma unroll 1
  for (int s = 0; s < p.T; ++s) {
    const int t = time_of(p, at.d, s);
    const StepRows rows(p, t);
#pragma unroll 1
    for (int b0 = at.lo; b0 < min(at.hi, rows.n); b0 += G::kBatch) {
      float x[G::kCells][4];
      bool here[G::kCells];
#pragma unroll
      for (int i = 0; i < G::kCells; ++i) {  // on their way during the product
        const int b = b0 + mine.first + i * G::kStep;
        here[i] = unit < p.H && b < at.hi && has_step(p, b, t, rows.n);
        const int64_t row = int64_t(at.d) * p.N + rows.first + b;
#pragma unroll
        for (int k = 0; k < kGates; ++k)
          x[i][k] = here[i] ? load<T>(p.gx, (row * kGates + k) * p.H + unit) : 0.f;
      }
      product_of_tile<G>(weights, exchange, s % 2, at, b0, shared.parts);
      __syncthreads();  // the sums of all warps are there
#pragma unroll
      for (int i = 0; i < G::kCells; ++i) {
        const int in_tile = mine.first + i * G::kStep, b = b0 + in_tile;
        if (unit >= p.H || b >= min(at.hi, rows.n)) continue;
        const int64_t row = rows.first + b;
        if (!here[i]) {
          store<T>(p.y, (row * p.D + at.d) * p.P + unit, 0.f);
          continue;
        }
        const int64_t state = (int64_t(at.d) * p.B + b) * p.H + unit;
        CellState now = {Cell::kReadsH ? c.h[state] : 0.f, Cell::kHasC ? c.c[state] : 0.f};
        float gh[4], saved[4];
#pragma unroll
        for (int k = 0; k < kGates; ++k) gh[k] = whole_sum<G>(shared.parts, k, mine.unit, in_tile);
        Cell::forward(x[i], gh, b_hn, p.cell, now, saved);
        exchange.write((s + 1) % 2, b - at.lo, unit, masked<T>(p, state, now.h));
        c.h[state] = now.h;
        if (Cell::kHasC) c.c[state] = now.c;
        store<T>(p.y, (row * p.D + at.d) * p.P + unit, now.h);
        const int64_t of_direction = int64_t(at.d) * p.N + row;
        if (Cell::kSaved && p.gates)
#pragma unroll
          for (int k = 0; k < Cell::kSaved; ++k)
            store<T>(p.gates, (of_direction * 4 + k) * p.H + unit, saved[k]);
        if (Cell::kHasC && p.cells) store<T>(p.cells, of_direction * p.H + unit, now.c);
      }
      __syncthreads();  // the sums are read
    }
    if (s + 1 < p.T) meet();
  }

  if (unit >= p.H) return;
  for (int b = at.lo + mine.first; b < at.hi; b += G::kStep) {
    const int64_t i = (int64_t(at.d) * p.B + b) * p.H + unit;
    store<T>(p.h_n, i, c.h[i]);
    if (Cell::kHasC) store<T>(p.c_n, i, c.c[i]);
  }
}

}  // namespace fastattn::cuda
