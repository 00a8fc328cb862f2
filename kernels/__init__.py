"""Triton kernels and their launchers, packaged as ``fastattn.kernels``. They know nothing of torch ops."""
