// One step of one direction of an LSTM, a GRU or an RNN, fp32, with its products: the torch-free
// interface of what the cells' modules call.
//
//   forward   gates = W_ih x + b_ih + W_hh h + b_hh, then the cell
//   backward  the gates' gradients dg;  dx = dg W_ih, dh = dg W_hh, dW_ih = dg^T x, dW_hh = dg^T h,
//             db = the sum of dg over sequences
//
// B sequences, I inputs, H hidden features, G gates. 2 B G H (I + H) FLOPs forward, twice that
// backward; a step of few sequences is bound by reading W (backward: by writing dW too), so W is
// read where it lies, once, by whoever multiplies with it: packing it, which a library's GEMM does,
// costs as much as the product. Beyond some 16 sequences a library's GEMMs are faster. The caller
// owns every pointer; all are contiguous. Each result is computed by one worker in one order,
// whatever the thread count.
#pragma once

#include "recurrent.h"

namespace fastattn {

inline constexpr int64_t kStepMultiple = 16;

struct StepParams {
  Cell cell = Cell::kLstm;
  int64_t B = 0, I = 0, H = 0;                           // B > 0; I, H: multiples of kStepMultiple
  const float *x = nullptr, *h = nullptr, *c = nullptr;  // (B, I), (B, H), (B, H): c LSTM's
  const float *w_ih = nullptr, *w_hh = nullptr;          // (G H, I), (G H, H)
  const float *b_ih = nullptr, *b_hh = nullptr;          // (G H,) or null
  // Results: (B, H), LSTM's (B, H), and (B, 4 H) for the backward, or null: LSTM i f g o, GRU r z n
  // hn, the RNN has none.
  float *h_new = nullptr, *c_new = nullptr, *gates = nullptr;
};

// p: as in the forward, its results inputs. A result that is null is not wanted.
struct StepGrads {
  const float *dh_new = nullptr, *dc_new = nullptr;   // null = 0
  float *dx = nullptr, *dh = nullptr, *dc = nullptr;  // like x, h, c
  float *dw_ih = nullptr, *dw_hh = nullptr;           // like w_ih, w_hh
  float *db_ih = nullptr, *db_hh = nullptr;           // (G H,)
};

void recurrent_step_forward(const StepParams& p, const Parallel& parallel);
void recurrent_step_backward(const StepParams& p, const StepGrads& g, const Parallel& parallel);

FASTATTN_IN_EVERY_ISA(void recurrent_step_forward(const StepParams& p, const Parallel& parallel);
                      void recurrent_step_backward(const StepParams& p, const StepGrads& g,
                                                   const Parallel& parallel);)

}  // namespace fastattn
