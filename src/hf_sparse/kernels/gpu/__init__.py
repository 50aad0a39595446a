"""Products on NVIDIA GPUs: sliced ELLPACK through Triton, and torch's 2:4."""
