"""Sparse weights on NVIDIA GPUs: the layout, and the Triton kernels that multiply with it."""
