"""Weights in the tile layout beside their dense values, and what their products may be off by."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.pack import narrow, pack_dense
from hf_sparse.kernels.cpu.weight import TileWeight

PATHS = list(library.paths()) if library.available() else []
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, and what a product of k terms may lose in fp32 on top.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sparse(n: int, k: int, sparsity: float, generator: torch.Generator) -> Tensor:
    dense = torch.randn(n, k, generator=generator)
    return dense * (torch.rand(n, k, generator=generator) >= sparsity)


def bitmask_of(dense: Tensor) -> tuple[Tensor, Tensor]:
    """The file's layout, written the slow and obvious way."""
    n, k = dense.shape
    bits = torch.zeros(n, -(-k // 8) * 8, dtype=torch.uint8)
    bits[:, :k] = dense != 0
    weights = 2 ** torch.arange(8, dtype=torch.int32)
    mask = (bits.reshape(n, -1, 8).int() * weights).sum(-1).to(torch.uint8)
    return mask, dense[dense != 0]


def quantised(
    n: int,
    k: int,
    groups: int | None,
    sparsity: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.int8,
) -> tuple[TileWeight, Tensor]:
    """An int8 or int4 weight and its dense value in float64."""
    top = 7 if dtype == library.INT4 else 127
    q = (torch.randn(n, k, generator=generator) * top / 3).clamp(-top - 1, top).to(torch.int8)
    q[torch.rand(n, k, generator=generator) < sparsity] = 0
    size = groups or k
    scales = torch.rand(n, -(-k // size), generator=generator) * 0.1 + 0.01
    dense = q.double() * scales.double().repeat_interleave(size, 1)[:, :k]
    weight = pack_dense(q, scales, size)
    return narrow(weight) if dtype == library.INT4 else weight, dense


def assert_close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """y within the rounding of its dtype and of an fp32 sum, relative to sum |x| |w|."""
    expected = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        expected = expected + bias.double()
        size = size + bias.double().abs()
    k = x.shape[-1]
    allowed = ROUNDING[y.dtype] * expected.abs() * 1.01 + 2.0**-24 * (k**0.5 + 4) * 2 * size
    if y.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # subnormals
    error = (y.double() - expected).abs()
    assert (error <= allowed + 1e-37).all(), (error - allowed).max()
