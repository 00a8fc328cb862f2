// The kernels that keep W_hh resident, for every cell, and the tables that recurrent.cu looks into.
// lstm.cu, gru.cu and rnn.cu compile a cell each: a file with all of them would take a minute.
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

template <class Cell_, typename T_, int kUnits_>
struct RecurrentConfig {
  using Cell = Cell_;
  using T = T_;
  static constexpr int kUnits = kUnits_;
};

template <class C>
__global__ void __launch_bounds__(kRecurrentThreads, 1)
    recurrent_fwd_kernel(const __grid_constant__ RecurrentCall c) {
  recurrent_forward_block<C>(c);
}
template <class C>
__global__ void __launch_bounds__(kRecurrentThreads, 1)
    recurrent_bwd_kernel(const __grid_constant__ RecurrentCall c) {
  recurrent_backward_block<C>(c);
}

// The kernel's bytes of shared memory beyond `rest` chunks of weights and a block's own exchange.
template <class G>
constexpr VariantInfo recurrent_info(const char* kernel, DType dtype) {
  return {kernel, dtype, G::kUnits, true, G::kBatch, G::kHeld, kRecurrentThreads, G::kPartBytes};
}

template <class Cell>
struct RecurrentKernels {
  template <typename T, int kUnits>
  static constexpr RecurrentVariant forward(DType dtype) {
    using G = Geometry<T, Cell::kGates, kUnits>;
    return {recurrent_info<G>(Cell::kForward, dtype),
            recurrent_fwd_kernel<RecurrentConfig<Cell, T, kUnits>>};
  }
  template <typename T, int kUnits>
  static constexpr RecurrentVariant backward(DType dtype) {
    using G = Geometry<T, 1, kUnits>;
    return {recurrent_info<G>(Cell::kBackward, dtype),
            recurrent_bwd_kernel<RecurrentConfig<Cell, T, kUnits>>};
  }
};

#ifdef FASTATTN_RECURRENT_VARIANTS  // tests that compile often want few
#define FASTATTN_TABLE(make) FASTATTN_RECURRENT_VARIANTS(make)
#else
#define FASTATTN_UNITS(make, T, dtype) make<T, kUnitsOfGrid>(dtype), make<T, kUnitsOfBlock>(dtype)
#define FASTATTN_TABLE(make)                                                                    \
  FASTATTN_UNITS(make, __nv_bfloat16, DType::kBf16), FASTATTN_UNITS(make, __half, DType::kF16), \
      FASTATTN_UNITS(make, float, DType::kF32)
#endif

template <class Cell>
RecurrentTable recurrent_table() {
  using Kernels = RecurrentKernels<Cell>;
  static const RecurrentVariant kForward[] = {FASTATTN_TABLE(Kernels::template forward)};
  static const RecurrentVariant kBackward[] = {FASTATTN_TABLE(Kernels::template backward)};
  return {kForward, kBackward, int(sizeof(kForward) / sizeof(*kForward))};
}
#undef FASTATTN_TABLE

}  // namespace fastattn::cuda
