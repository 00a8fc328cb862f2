"""Triton kernels and their launchers, packaged as ``fastattn.kernels``. They know no torch ops."""
