"""Triton kernels and their launchers, one file per op; imported only where triton is."""
