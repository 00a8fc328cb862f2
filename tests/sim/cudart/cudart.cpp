// A stand-in for the CUDA runtime: the part of libcudart that nvcc's host code and our launchers
// call, for objects that are linked with it instead of libcudart_static.a. A launch is checked as
// the runtime would check it, for the architecture that is played, and handed to a callback, which
// has the kernel's PTX (in the fatbin that the object registered) run by the simulator.
//
// What an object needs beyond this fails to link, by name. Nothing of it is exported: torch has a
// libcudart of its own in the process, and neither may see the other's calls.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Launched {
  const void* fatbin;
  const char* kernel;
  uint32_t grid[3], block[3];
  void** args;
  uint64_t shared;
  void* stream;
  int32_t cooperative, device;
};
// Returns a cudaError_t.
using OnLaunch = int (*)(const Launched*);
using OnRegion = void (*)(const void* data, int64_t bytes, int access, const char* name);
using OnForget = void (*)();

struct Function {
  const void* fatbin = nullptr;
  std::string name;
  int dynamic_shared = 48 << 10;  // what may be asked for without cudaFuncSetAttribute
};

// CUDA C++ programming guide, "Technical Specifications per Compute Capability".
struct Device {
  int major = 8, minor = 0, multiprocessors = 108;
  int shared_block = 163 << 10, shared_multiprocessor = 164 << 10;
  int threads_multiprocessor = 2048, blocks_multiprocessor = 32;
};
constexpr int kReservedShared = 1 << 10;  // the system's, a block
constexpr unsigned kMaxBlock[3] = {1024, 1024, 64}, kMaxThreads = 1024;
constexpr unsigned kMaxGrid[3] = {0x7fffffffu, 65535, 65535};

struct State {
  std::mutex lock;
  std::map<const void*, Function> functions;  // by the address of the host's stub
  Device device;
  std::map<std::string, cudaError_t> injected;
  OnLaunch on_launch = nullptr;
  OnRegion on_region = nullptr;
  OnForget on_forget = nullptr;
  int tensors_device = 0, guarded = -1;
  cudaStream_t stream = nullptr;
};
constexpr int kDevices = 2;
// A stream belongs to a device: what a test calls one is its device in the upper half.
int device_of(cudaStream_t stream) { return int(uintptr_t(stream) >> 32); }

State& state() {  // objects register from static initialisers, in any order
  static State s;
  return s;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> t_configurations;
thread_local cudaError_t t_last = cudaSuccess;
thread_local int t_device = 0;   // the current one of this copy of the runtime
thread_local std::string t_why;  // of the last error, beyond what CUDA says

cudaError_t report(cudaError_t error, std::string why = "") {
  if (error != cudaSuccess) t_last = error, t_why = std::move(why);
  return error;
}

struct Words {
  cudaError_t error;
  const char *name, *text;
};
Words words_of(cudaError_t error) {
  static constexpr Words kWords[] = {
      {cudaSuccess, "cudaSuccess", "no error"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
      {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
       "invalid configuration argument"},
      {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
      {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
       "no kernel image is available for execution on the device"},
      {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
       "too many resources requested for launch"},
      {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
      {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge",
       "too many blocks in cooperative launch"},
      {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
      {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
      {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
  };
  for (const Words& w : kWords)
    if (w.error == error) return w;
  return {error, "unrecognized error code", "unrecognized error code"};
}

bool injected(const char* call, cudaError_t& error) {
  std::lock_guard<std::mutex> hold(state().lock);
  const auto found = state().injected.find(call);
  if (found == state().injected.end()) return false;
  error = found->second;
  state().injected.erase(found);
  return true;
}

int occupancy(int threads, size_t dynamic_shared) {
  const Device& d = state().device;
  const int by_shared =
      int(size_t(d.shared_multiprocessor) / (dynamic_shared + size_t(kReservedShared)));
  const int by_threads = threads > 0 ? d.threads_multiprocessor / ((threads + 31) / 32 * 32) : 0;
  return std::min({by_shared, by_threads, d.blocks_multiprocessor});
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                   cudaStream_t stream, bool cooperative) {
  cudaError_t error = cudaSuccess;
  if (injected("cudaLaunchKernel", error)) return report(error);
  const auto found = state().functions.find(host);
  if (found == state().functions.end()) return report(cudaErrorInvalidDeviceFunction);
  const Function& f = found->second;
  Launched made{f.fatbin,
                f.name.c_str(),
                {grid.x, grid.y, grid.z},
                {block.x, block.y, block.z},
                args,
                shared,
                stream,
                cooperative,
                t_device};
  if (stream != nullptr && device_of(stream) != t_device)
    return report(cudaErrorInvalidResourceHandle, "the stream is another device's");
  uint64_t threads = 1, blocks = 1;
  for (int axis = 0; axis < 3; ++axis) {
    threads *= made.block[axis], blocks *= made.grid[axis];
    if (made.block[axis] > kMaxBlock[axis] || made.grid[axis] > kMaxGrid[axis])
      return report(cudaErrorInvalidConfiguration);
  }
  if (threads == 0 || blocks == 0 || threads > kMaxThreads)
    return report(cudaErrorInvalidConfiguration);
  if (shared > size_t(f.dynamic_shared)) return report(cudaErrorInvalidValue);
  const uint64_t resident =
      uint64_t(occupancy(int(threads), shared)) * uint64_t(state().device.multiprocessors);
  if (cooperative && blocks > resident) return report(cudaErrorCooperativeLaunchTooLarge);
  if (state().on_launch == nullptr)
    return report(cudaErrorLaunchFailure, "no simulator listens to this stand-in");
  t_why.clear();  // the callback may say more
  error = cudaError_t(state().on_launch(&made));
  return error == cudaSuccess ? error : report(error, std::move(t_why));
}

}  // namespace

// ---- the side of the tests

EXPORT void stand_in_listen(OnLaunch launch, OnRegion region, OnForget forget) {
  state().on_launch = launch, state().on_region = region, state().on_forget = forget;
}
EXPORT void stand_in_play(int major, int minor, int multiprocessors, int shared_block,
                          int shared_multiprocessor) {
  Device& d = state().device;
  d.major = major, d.minor = minor, d.multiprocessors = multiprocessors;
  d.shared_block = shared_block, d.shared_multiprocessor = shared_multiprocessor;
  // 8.6 and 8.9: 1536 threads, 16 and 24 blocks; 12.0: 1536, 24. The others: 2048, 32.
  const bool small = (major == 8 && minor > 0) || major == 12;
  d.threads_multiprocessor = small ? 1536 : 2048;
  d.blocks_multiprocessor = small ? (major == 8 && minor == 6 ? 16 : 24) : 32;
  for (auto& [host, f] : state().functions) f.dynamic_shared = 48 << 10;
}
// The next call of that name fails.
EXPORT void stand_in_fail(const char* call, int error) {
  std::lock_guard<std::mutex> hold(state().lock);
  state().injected[call] = cudaError_t(error);
}
// How many injected failures have not happened; they are dropped.
EXPORT int stand_in_unused_failures() {
  std::lock_guard<std::mutex> hold(state().lock);
  const int n = int(state().injected.size());
  state().injected.clear();
  return n;
}
EXPORT void stand_in_explain(const char* why) { t_why = why; }
EXPORT int stand_in_registered(const char** names, int room) {
  int n = 0;
  for (const auto& [host, f] : state().functions)
    if (n++ < room) names[n - 1] = f.name.c_str();
  return n;
}

// Tensors are said to lie on this device, whose current stream is `stream`.
EXPORT void stand_in_place(int device, cudaStream_t stream) {
  state().tensors_device = device, state().stream = stream;
}
// torch's current device, -1 = as it was before any call.
EXPORT int stand_in_guarded() { return state().guarded; }

// ---- the side of a binding that was built with FASTATTN_STAND_IN

extern "C" void stand_in_region(const void* data, int64_t bytes, int access, const char* name) {
  if (state().on_region != nullptr) state().on_region(data, bytes, access, name);
}
extern "C" void stand_in_forget() {
  if (state().on_forget != nullptr) state().on_forget();
}

extern "C" int stand_in_device() { return state().tensors_device; }
extern "C" cudaStream_t stand_in_stream(int device) {
  return device == state().tensors_device ? state().stream : nullptr;
}
extern "C" void stand_in_guard(int device, bool entered) {
  state().guarded = entered ? device : -1;
}

// ---- the runtime, as nvcc's host code calls it (crt/host_runtime.h)

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const void** handle = new const void*(wrapper);  // as long as the process, like the object itself
  return const_cast<void**>(handle);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) {
  // Runs at exit too, when statics may be gone: only the handle is touched.
  delete handle;
}

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Function f;
  std::memcpy(&f.fatbin, static_cast<const char*>(*handle) + 8, sizeof(f.fatbin));
  f.name = name;
  std::lock_guard<std::mutex> hold(state().lock);
  state().functions[host] = f;
}
// A __device__ variable: the PTX has its initial value, and the host never asks for it.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  t_configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (t_configurations.empty()) return report(cudaErrorInvalidConfiguration);
  const Configuration c = t_configurations.back();
  t_configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared, stream, false);
}

// ---- the public API

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  return launch(host, grid, block, args, shared, stream, false);
}
cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** args,
                                        size_t shared, cudaStream_t stream) {
  return launch(host, grid, block, args, shared, stream, true);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = t_last;
  t_last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return t_last; }

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  cudaError_t error = cudaSuccess;
  if (injected("cudaFuncSetAttribute", error)) return report(error);
  std::lock_guard<std::mutex> hold(state().lock);
  const auto found = state().functions.find(host);
  if (found == state().functions.end()) return report(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return report(cudaErrorNotSupported, "the stand-in does not know this attribute");
  if (value < 0 || value > state().device.shared_block) return report(cudaErrorInvalidValue);
  found->second.dynamic_shared = value;
  return cudaSuccess;
}

// At once: the stand-in's streams wait for nothing. The memory is the binding's to name.
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (injected("cudaMemsetAsync", error)) return report(error);
  if (stream != nullptr && device_of(stream) != t_device)
    return report(cudaErrorInvalidResourceHandle, "the stream is another device's");
  if (to == nullptr && bytes > 0) return report(cudaErrorInvalidValue);
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  cudaError_t error = cudaSuccess;
  if (injected("cudaSetDevice", error)) return report(error);
  if (device < 0 || device >= kDevices) return report(cudaErrorInvalidDevice);
  t_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = t_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& d = state().device;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_multiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    default:
      return report(cudaErrorNotSupported, "the stand-in does not know this attribute");
  }
  return cudaSuccess;
}

// By shared memory and threads; registers are ptxas's to say, and no ptxas runs here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared) {
  *blocks = occupancy(threads, shared);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  *blocks = occupancy(threads, shared);
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) { return words_of(error).name; }

const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = words_of(error).text;
  if (!t_why.empty()) text += ": " + t_why;
  return text.c_str();
}

}  // extern "C"
