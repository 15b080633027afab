"""The kernels themselves: Triton sources and the thin face of the compiled module."""
