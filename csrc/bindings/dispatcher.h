// Ops called from C++ by name.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>

namespace fastattn::binding {

// The stack holds the op's arguments before and its results afterwards.
template <size_t kSize>
void call(const char* op, std::array<StableIValue, kSize>& stack, const char* overload = "") {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
}

}  // namespace fastattn::binding
