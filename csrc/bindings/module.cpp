// fastattn._C and fastattn._C_cuda: importing one loads its kernels, which register themselves
// under torch.ops.fastattn. The build defines TORCH_EXTENSION_NAME.

#include <Python.h>

#define FASTATTN_JOIN_(a, b) a##b
#define FASTATTN_JOIN(a, b) FASTATTN_JOIN_(a, b)
#define FASTATTN_QUOTE_(a) #a
#define FASTATTN_QUOTE(a) FASTATTN_QUOTE_(a)

extern "C" __attribute__((visibility("default"))) PyObject* FASTATTN_JOIN(PyInit_,
                                                                          TORCH_EXTENSION_NAME)() {
  static PyModuleDef def = {PyModuleDef_HEAD_INIT,
                            FASTATTN_QUOTE(TORCH_EXTENSION_NAME),
                            nullptr,
                            -1,
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr};
  return PyModule_Create(&def);
}
