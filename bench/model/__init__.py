"""A performance model of the GPU kernels, read off their machine code. It measures nothing."""
