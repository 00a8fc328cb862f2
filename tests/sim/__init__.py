"""GPU code executed on the CPU: the simulators behind the tests of the CUDA and Triton kernels."""
