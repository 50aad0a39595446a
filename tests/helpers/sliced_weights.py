"""Weights for the sliced layout, on a GPU where there is one."""

import torch

from hf_sparse.formats import Bitmask
from hf_sparse.kernels import Stored
from hf_sparse.kernels.gpu.kernel import SlicedKernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pruned(rows, columns, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    return (weight * kept).to(DEVICE, dtype)


def coded(rows, columns, bits, group):
    """Codes, and scales of groups of columns."""
    limit = 2 ** (bits - 1) - 1
    codes = (pruned(rows, columns, 0.5) * limit / 3).round().clamp(-limit, limit).to(torch.int8)
    return codes, torch.rand(rows, -(-columns // group), device=DEVICE) + 0.1


def scaled(codes, scales, group):
    """The weight of codes, in double precision."""
    columns = torch.arange(codes.shape[1], device=codes.device) // group
    return codes.double() * scales.double()[:, columns]


def kernel_of(weight, fmt=None):
    fmt = fmt or Bitmask()
    return SlicedKernel.of(Stored(fmt, fmt.pack(weight), tuple(weight.shape), weight.dtype))
