// LSTM, GRU and RNN on the CPU, one layer after the product of its inputs: the torch-free
// interface.
//
//   LSTM  i, f, o = sigmoid(.), g = tanh(.) of gx + W_hh h;  c' = f c + i g;  h' = o tanh(c')
//   GRU   r, z = sigmoid(gx + W_hh h), n = tanh(gx_n + r hn), hn = W_hn h + b_hn;  h' = n + z (h -
//   n) RNN   h' = tanh or relu(gx + W_hh h)
//
// T steps, B sequences, H hidden features, P of h (P = H without a projection), G gates, D
// directions. The sequences that have step t are its slots 0..n_t-1 (n_t never rises with t: slots
// are sorted by length), and slot k of step t is row first(t) + index(k). The caller owns every
// pointer.
#pragma once

#include <cstdint>

#include "../operands.h"
#include "isa.h"
#include "parallel.h"

namespace fastattn {

enum class Cell : int { kLstm = 0, kGru = 1, kTanh = 2, kRelu = 3 };
inline constexpr int kGates[] = {4, 3, 1, 1};
inline constexpr int kSaved[] = {4, 4, 0, 0};  // of the gates: GRU's fourth is hn

// Which rows there are.
struct Steps {
  int64_t T = 0, B = 0, N = 0;       // N rows in all
  const int64_t* offsets = nullptr;  // (T + 1,): packed; null: row t B + index(k)
  const int64_t* lengths = nullptr;  // (B,) by slot, falling; null: as offsets say, or all T
  const int64_t* index = nullptr;    // (B,): the sequence of a slot; null: the slot itself
  const int64_t* active = nullptr;   // (T,): n_t; null: all B

  int64_t first(int64_t t) const { return offsets ? offsets[t] : t * B; }
};

// gx made in parts, which stay in the caches and in few pages. Before the steps [bounds[i],
// bounds[i + 1]) of every direction, counted as it takes them, `make` runs on the caller's thread
// and writes what these steps read, rows [row, row + rows) of the whole, to the start of its
// direction in gx.
struct Parts {
  const int64_t* bounds = nullptr;  // (n + 1,), from 0 to T
  int64_t n = 0;                    // 0: gx is whole
  int64_t rows = 0;                 // of gx a direction
  void (*make)(void* ctx, int d, int64_t row, int64_t rows) = nullptr;
  void* ctx = nullptr;
};

// Storage of every operand is of one dtype; rows are contiguous.
struct RecurrentParams {
  Cell cell = Cell::kLstm;
  DType dtype = DType::kF32;
  int64_t H = 0, P = 0;
  int D = 1;
  unsigned reverse = 0;  // bit d: direction d runs from the last step to the first
  Steps steps;
  Parts parts;
  const void* gx =
      nullptr;  // (D, N or parts.rows, G H), without biases; where whole it may be gates
  const void* gh = nullptr;  // (D, B, G H): W_hh h0 made by the caller (T = 1), or null
  const void* w_hh[2] = {};  // (G H, P); unused where gh is given
  const void *b_ih[2] = {}, *b_hh[2] = {};            // (G H,) or null
  const void* w_hr[2] = {};                           // (P, H) projection, or null
  const void *h0 = nullptr, *c0 = nullptr;            // (D, B, P), (D, B, H)
  const void* h_mask = nullptr;                       // (D, B, P) or null
  void *y = nullptr, *h_n = nullptr, *c_n = nullptr;  // (N, D P), (D, B, P), (D, B, H): results
  void *gates = nullptr, *cells = nullptr;            // (D, N, 4 H), (D, N, H): results, or null

  bool backwards(int d) const { return reverse >> d & 1; }
  // Where the rows of direction d's steps [s0, s1) begin and end.
  int64_t first_row(int d, int64_t s0, int64_t s1) const {
    return steps.first(backwards(d) ? steps.T - s1 : s0);
  }
  int64_t end_row(int d, int64_t s0, int64_t s1) const {
    return steps.first(backwards(d) ? steps.T - s0 : s1);
  }
};

// p: as in the forward; y, gates, cells are inputs, h_n and c_n unused.
struct RecurrentGrads {
  const void *dy = nullptr, *dh_n = nullptr, *dc_n = nullptr;  // like y, h_n, c_n; null = 0
  void* dgx = nullptr;                                         // (D, N, G H)
  void* dghn = nullptr;                                        // (D, N, H) GRU
  // (D, B, P), (D, B, H). Where p.gh is given dh0 lacks the product's part, W_hh^T dgates.
  void *dh0 = nullptr, *dc0 = nullptr;
  void* dh = nullptr;  // (D, N, P), with a projection
};

void recurrent_forward(const RecurrentParams& p, const Parallel& parallel);
void recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                        const Parallel& parallel);

FASTATTN_IN_EVERY_ISA(void recurrent_forward(const RecurrentParams& p, const Parallel& parallel);
                      void recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                                              const Parallel& parallel);)

}  // namespace fastattn
