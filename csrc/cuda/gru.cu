// The GRU's kernels that keep W_hh resident: see recurrent_fwd.cuh and recurrent_bwd.cuh.
#include "recurrent_launch.cuh"

namespace fastattn::cuda {

RecurrentTable gru_kernels() { return recurrent_table<GruCell>(); }

}  // namespace fastattn::cuda
