// The LSTM's kernels that keep W_hh resident: see recurrent_fwd.cuh and recurrent_bwd.cuh.
#include "recurrent_launch.cuh"

namespace fastattn::cuda {

RecurrentTable lstm_kernels() { return recurrent_table<LstmCell>(); }

}  // namespace fastattn::cuda
