// How attention's launchers, on every device, are told where tensors lie. Strides are in elements.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int { kF32 = 0, kBf16 = 1, kF16 = 2, kBool = 3 };

// (B, H, S, X) operand; the last dimension has a stride too.
struct Operand {
  void* ptr = nullptr;
  int64_t b = 0, h = 0, s = 0, d = 0;
};

// Broadcast to (B, H, Sq, Sk): a broadcast dimension has stride 0. ptr null = absent.
struct Broadcast {
  const void* ptr = nullptr;
  DType dtype = DType::kF32;
  int64_t b = 0, h = 0, i = 0, j = 0;
};

enum class Causal : int { kNone = 0, kTopLeft = 1, kBottomRight = 2 };
enum class Weights : int { kNone = 0, kFull = 1, kMean = 2 };

}  // namespace fastattn
