// What a launcher reports, of every op: what it launched, and what was compiled.
#pragma once

#include <cuda_runtime_api.h>

#include "../operands.h"

namespace fastattn::cuda {

// What was launched, for the message where it fails.
struct Launch {
  cudaError_t error = cudaSuccess;
  const char* kernel = "";
  unsigned grid = 0, block = 0, shared = 0;  // shared: dynamic bytes a block
};

// What was compiled: for budgets and benches.
struct VariantInfo {
  const char* kernel;
  DType dtype;
  int head_dim;  // the widest it serves
  bool laden;    // serves every feature, not scale, causal, window, lengths and sinks alone
  int rows, keys, threads, shared;
  bool atomics = false;  // of two that are alike otherwise, the one that adds dq up by atomics
};

}  // namespace fastattn::cuda
