// The tables of lstm.cu, gru.cu and rnn.cu, and what recurrent.cu asks of them.
#pragma once

#include "launch.cuh"
#include "recurrent_bwd.cuh"

namespace fastattn::cuda {

using RecurrentVariant = Variant<RecurrentCall>;

// A cell's kernels: for every dtype 16 units a block, which share W_hh, and 128, which have it.
struct RecurrentTable {
  const RecurrentVariant *forward, *backward;
  int count;  // of each
};
RecurrentTable lstm_kernels();
RecurrentTable gru_kernels();
RecurrentTable rnn_kernels();

constexpr int kUnitsOfGrid = kUnitTile, kUnitsOfBlock = kUnitTile * kRecurrentWarps;

// The kernel's bytes of shared memory beyond `rest` chunks of weights and a block's own exchange.
template <class G>
constexpr VariantInfo recurrent_info(const char* kernel, DType dtype) {
  return {kernel, dtype, G::kUnits, true, G::kBatch, G::kHeld, kRecurrentThreads, G::kPartBytes};
}

}  // namespace fastattn::cuda
