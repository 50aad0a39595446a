"""What runs on NVIDIA GPUs through Triton: sparse products, and SparseGPT's inner loop."""
