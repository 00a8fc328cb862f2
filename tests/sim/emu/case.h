// A case: what a launcher is called with, read from a file; tensors lie in allocations of exactly
// their size. File: lines of text, then the bytes of the tensors in order.
//
//   fastattn-case 1
//   launcher NAME
//   int NAME VALUE | float NAME VALUE
//   tensor NAME DTYPE in|out LEAD BYTES NDIM SIZE... STRIDE...     LEAD: bytes by which to misalign
//   end
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fastattn::emu {

struct Tensor {
  std::string name, dtype;
  bool out = false;
  size_t lead = 0, bytes = 0;
  std::vector<int64_t> sizes, strides;  // elements
  unsigned char* allocation = nullptr;
  bool used = false;

  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(allocation + lead);
  }
};

class Case {
 public:
  explicit Case(const std::string& path);
  ~Case();
  Case(const Case&) = delete;

  std::string launcher;
  // Required values; the program ends where one is missing.
  int64_t integer(const std::string& name);
  double real(const std::string& name);
  Tensor& tensor(const std::string& name);
  // Null where absent.
  Tensor* find(const std::string& name);
  template <class T = void>
  T* data(const std::string& name) {
    Tensor* t = find(name);
    return t ? t->data<T>() : nullptr;
  }
  // Ends the program where the launcher left an entry unread: a misspelt name is no default.
  void check_all_used() const;
  void write(const std::string& path, cudaError_t error) const;

 private:
  struct Number {
    std::string text;
    bool used = false;
  };
  std::map<std::string, Number> numbers_;
  std::vector<Tensor> tensors_;
};

using Launcher = cudaError_t (*)(Case&);
struct RegisterLauncher {
  RegisterLauncher(const char* name, Launcher f);
};
// A function from the case to the error that the launch ended with.
#define FASTATTN_EMU_LAUNCHER(name)                                                       \
  static cudaError_t launcher_##name(::fastattn::emu::Case&);                             \
  static const ::fastattn::emu::RegisterLauncher register_##name(#name, launcher_##name); \
  static cudaError_t launcher_##name(::fastattn::emu::Case& c)

}  // namespace fastattn::emu
