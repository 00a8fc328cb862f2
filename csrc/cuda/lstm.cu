// The LSTM's kernels that keep W_hh resident: see recurrent_fwd.cuh and recurrent_bwd.cuh.
#include "recurrent_launch.cuh"

namespace fastattn::cuda {
namespace {

template <typename T_, int kUnits_>
struct Config {
  using T = T_;
  using Cell = LstmCell;
  static constexpr int kUnits = kUnits_;
};

template <class C>
__global__ void __launch_bounds__(kRecurrentThreads, 1)
    lstm_fwd_kernel(const __grid_constant__ RecurrentCall c) {
  recurrent_forward_block<C>(c);
}
template <class C>
__global__ void __launch_bounds__(kRecurrentThreads, 1)
    lstm_bwd_kernel(const __grid_constant__ RecurrentCall c) {
  recurrent_backward_block<C>(c);
}

template <typename T, int kUnits>
constexpr RecurrentVariant forward(DType dtype) {
  using G = Geometry<T, LstmCell::kGates, kUnits>;
  return {recurrent_info<G>("lstm_fwd_kernel", dtype), lstm_fwd_kernel<Config<T, kUnits>>};
}
template <typename T, int kUnits>
constexpr RecurrentVariant backward(DType dtype) {
  using G = Geometry<T, 1, kUnits>;
  return {recurrent_info<G>("lstm_bwd_kernel", dtype), lstm_bwd_kernel<Config<T, kUnits>>};
}

#ifdef FASTATTN_RECURRENT_VARIANTS  // tests that compile often want few
#define FASTATTN_TABLE(make) FASTATTN_RECURRENT_VARIANTS(make)
#else
#define FASTATTN_UNITS(make, T, dtype) make<T, kUnitsOfGrid>(dtype), make<T, kUnitsOfBlock>(dtype)
#define FASTATTN_TABLE(make)                                                                    \
  FASTATTN_UNITS(make, __nv_bfloat16, DType::kBf16), FASTATTN_UNITS(make, __half, DType::kF16), \
      FASTATTN_UNITS(make, float, DType::kF32)
#endif
const RecurrentVariant kForward[] = {FASTATTN_TABLE(forward)};
const RecurrentVariant kBackward[] = {FASTATTN_TABLE(backward)};

}  // namespace

RecurrentTable lstm_kernels() {
  return {kForward, kBackward, int(sizeof(kForward) / sizeof(*kForward))};
}

}  // namespace fastattn::cuda
