// The recurrence of LSTM, GRU and RNN on NVIDIA GPUs (sm_80 and newer): the torch-free interface.
//
//   gx = W_ih x + b  is the caller's GEMM, as are the products for the gradients of the weights;
//   here, for every step t of every direction:  gh = W_hh (h_mask * h),  h, c = cell(gx_t, gh, h,
//   c)
//
// T steps, B sequences, H hidden features, P features of h (P = H without a projection), D
// directions, G gates (LSTM 4: i f g o; GRU 3: r z n; RNN 1), N rows. Semantics, rows, offsets,
// lengths and reverse: fastattn/reference/recurrent.py. The caller owns every pointer; all are
// contiguous and of one dtype; kernels write only what the comments call results. c and h are
// carried in fp32; what a product reads is rounded to the dtype. Lengths and offsets are read on
// the device, and whatever they hold the kernels stay inside their tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../operands.h"
#include "variant.h"

namespace fastattn::cuda {

// Numbered as the op's arguments are.
enum class Cell : int { kLstm = 0, kGru = 1, kRnnTanh = 2, kRnnRelu = 3 };

constexpr int kMaxDirections = 2;
constexpr int recurrent_gates(Cell cell) {
  return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1;
}

struct RecurrentParams {
  int T = 0, B = 0, H = 0, P = 0, D = 1;
  int64_t N = 0;
  DType dtype = DType::kF32;
  Cell cell = Cell::kLstm;
  int reverse = 0;  // bit d: direction d runs from the last step to the first

  const void* gx = nullptr;                 // (D, N, G H)
  const void* w_hh[kMaxDirections] = {};    // (G H, P)
  const void* b_hn[kMaxDirections] = {};    // (H,), GRU's; null = 0
  const void *h0 = nullptr, *c0 = nullptr;  // (D, B, P), (D, B, H); c0 LSTM's
  const void* h_mask = nullptr;             // (D, B, P); null = none
  const int64_t* offsets = nullptr;         // (T + 1,): packed rows; null = rows t B + b
  const void* lengths = nullptr;            // (B,); null = all T
  bool wide_lengths = false;                // int64, not int32

  // Results of the forward, and what its backward reads of them.
  void* y = nullptr;      // (N, D P), 0 where a sequence has no step
  void* h_n = nullptr;    // (D, B, P)
  void* c_n = nullptr;    // (D, B, H), LSTM's
  void* gates = nullptr;  // (D, N, 4 H): LSTM i f g o, GRU r z n hn; null = not wanted, RNN's
  void* cells = nullptr;  // (D, N, H): LSTM's c; null = not wanted
};

struct RecurrentGrads {
  const void *dy = nullptr, *dh_n = nullptr, *dc_n = nullptr;  // as y, h_n, c_n; null = 0

  // Results.
  void* dgx = nullptr;   // (D, N, G H), 0 where a sequence has no step
  void* dghn = nullptr;  // (D, N, H), GRU's: the gradient of hn
  void* dh0 = nullptr;   // (D, B, P)
  void* dc0 = nullptr;   // (D, B, H), LSTM's
};

// How a call is run. kBlock: a block has all of W_hh, and a slice of the batch. kGrid: blocks share
// W_hh and meet after every step. kStep: W_hh does not fit the GPU's registers and shared memory; a
// GEMM of the caller's and a launch of recurrent_step_* a step.
enum class RecurrentTier : int { kBlock = 0, kGrid = 1, kStep = 2 };

// What a GPU has room for.
struct RecurrentRoom {
  int multiprocessors = 0;
  int shared = 0;    // bytes that a block may have
  int resident = 0;  // blocks of the grid tier's kernel that a multiprocessor holds at once
};

struct RecurrentPlan {
  RecurrentTier tier = RecurrentTier::kStep;
  int slices = 1;      // blocks that share W_hh of one direction
  int directions = 1;  // in one launch
  int rows = 0;        // sequences of a group of `slices` blocks
  int groups = 1;      // slices of the batch
  int shared = 0;      // bytes a block
};

// The tier and its sizes: a function of its arguments alone. from: the first tier to be considered.
RecurrentPlan recurrent_plan(const RecurrentParams& p, bool backward, const RecurrentRoom& room,
                             RecurrentTier from = RecurrentTier::kBlock);
// The current device's room for the call's kernels.
cudaError_t recurrent_room(const RecurrentParams& p, bool backward, RecurrentRoom& room);

// Bytes of scratch: `shared` is what blocks tell each other (the launcher zeroes it), `carried` the
// state in fp32.
struct RecurrentScratch {
  int64_t shared = 0, carried = 0;
};
RecurrentScratch recurrent_scratch(const RecurrentParams& p, bool backward,
                                   const RecurrentPlan& plan);

// kBlock and kGrid; T, B > 0, P == H. One launch, or one a direction; bitwise repeatable.
Launch recurrent_forward(const RecurrentParams& p, const RecurrentPlan& plan, void* shared,
                         void* carried, cudaStream_t stream);
Launch recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                          const RecurrentPlan& plan, void* shared, void* carried,
                          cudaStream_t stream);

// ---- kStep: what surrounds the caller's GEMMs of one step of all directions. Step s of the
// forward, or of the backward (then from the last, and s = T ends it).
struct RecurrentStep {
  RecurrentParams p;
  RecurrentGrads g;
  int s = 0;
  // The GEMM's result of each direction. Forward: (B, G H), W_hh h; recurrent_step_project: (B, P),
  // W_hr m. Backward: (B, P), W_hh^T dgh of the step before this one (not read where s = 0);
  // behind recurrent_step_gather: (B, H), W_hr^T dh.
  const void* product[kMaxDirections] = {};
  // Carried in fp32, read and written: h (D, B, P), c (D, B, H); backward: their gradients.
  float *h = nullptr, *c = nullptr;
  // What the next GEMM reads. Forward: h_mask * h (D, B, P), or, with a projection, m (D, B, H),
  // and recurrent_step_project: h_mask * h. Backward: dgh (D, B, G H); recurrent_step_gather: dh
  // (D, B, P). Forward: what a sequence without the step had stays; backward: its rows are 0.
  void* next = nullptr;
  void* dh = nullptr;  // recurrent_step_gather's result (D, N, P)
};
Launch recurrent_step_forward(const RecurrentStep& step, cudaStream_t stream);
Launch recurrent_step_backward(const RecurrentStep& step, cudaStream_t stream);
// LSTM's projection: after the forward's m, and before the backward's cell.
Launch recurrent_step_project(const RecurrentStep& step, cudaStream_t stream);
Launch recurrent_step_gather(const RecurrentStep& step, cudaStream_t stream);

// Writes up to `capacity` entries and returns how many there are. head_dim: hidden units a block.
int recurrent_variants(VariantInfo* out, int capacity);
int recurrent_step_variants(VariantInfo* out, int capacity);

}  // namespace fastattn::cuda
