"""Layers for the tests of solvers against oracles, and what those oracles share."""

from dataclasses import dataclass

import torch

from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Statistics


@dataclass
class Expected:
    weight: torch.Tensor
    mask: torch.Tensor
    margin: float
    """Smallest relative distance between a score that went and one that stayed."""


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """In double precision; a dead input counts as one of unit size."""
    matrix = hessian.double().clone()
    for j in range(len(matrix)):
        if matrix[j, j] == 0:
            matrix[j, j] = 1
    return matrix + damp * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def make_inputs(
    columns: int,
    dead: tuple[int, ...] = (),
    seed: int = 0,
    tokens: int | None = None,
    common: float = 0.5,
) -> torch.Tensor:
    """Correlated inputs, by default more tokens than columns, in double precision."""
    generator = torch.Generator().manual_seed(1000 * seed + columns)
    tokens = tokens or 2 * columns + 40
    mixed = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    shared = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    inputs = mixed + common * shared
    inputs[:, list(dead)] = 0
    return inputs


def make_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77 * seed + 1000 * rows + columns)
    return torch.randn(rows, columns, generator=generator)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def freeze(hessian: torch.Tensor) -> Statistics:
    norms = hessian.diagonal().clamp(min=0).sqrt().float()
    return Statistics(1, torch.ones(1, len(hessian)), norms, hessian.float())


def parsed(pattern: str | tuple[int, int]) -> Unstructured | NM:
    """A sparsity as a decimal, or n kept of m."""
    return Unstructured(float(pattern)) if isinstance(pattern, str) else NM(*pattern)


def loss(before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - W^) H (W - W^)'), in double precision."""
    change = before.double() - after.double()
    return float((change @ hessian.double() * change).sum())
