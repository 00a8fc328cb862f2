// fastattn._C and fastattn._C_cuda: importing one loads its kernels, which register themselves
// under torch.ops.fastattn. The build defines TORCH_EXTENSION_NAME; of _C_cuda also USE_CUDA, and
// FASTATTN_CUBINS and FASTATTN_PTX: the architectures it holds, e.g. 80,90a.

#include <Python.h>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#define FASTATTN_JOIN_(a, b) a##b
#define FASTATTN_JOIN(a, b) FASTATTN_JOIN_(a, b)
#define FASTATTN_QUOTE_(...) #__VA_ARGS__
#define FASTATTN_QUOTE(...) FASTATTN_QUOTE_(__VA_ARGS__)

namespace {

PyMethodDef methods[] = {
#ifdef USE_CUDA
    // Versions as CUDA counts them: 13000 is 13.0. `driver` is the newest CUDA that this machine's
    // driver knows; 0: there is no driver.
    {"build_info",
     [](PyObject*, PyObject*) -> PyObject* {
       int driver = 0;
       if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
       return Py_BuildValue("{s:i,s:s,s:s,s:i}", "runtime", CUDART_VERSION, "cubins",
                            FASTATTN_QUOTE(FASTATTN_CUBINS), "ptx", FASTATTN_QUOTE(FASTATTN_PTX),
                            "driver", driver);
     },
     METH_NOARGS, nullptr},
#endif
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* FASTATTN_JOIN(PyInit_,
                                                                          TORCH_EXTENSION_NAME)() {
  static PyModuleDef def = {PyModuleDef_HEAD_INIT,
                            FASTATTN_QUOTE(TORCH_EXTENSION_NAME),
                            nullptr,
                            -1,
                            methods,
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr};
  return PyModule_Create(&def);
}
