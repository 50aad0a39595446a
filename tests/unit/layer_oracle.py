"""What the oracles of `admm` and `alps` share: masks by sorting, and sums, in double precision."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from hf_sparse.patterns import NM, Unstructured
from hf_sparse.statistics import Statistics


@dataclass
class Expected:
    weight: torch.Tensor
    mask: torch.Tensor
    margin: float
    """Smallest relative distance between a score that went and one that stayed."""


class Masks:
    """Masks by sorting, with the smallest margin met so far."""

    def __init__(self) -> None:
        self.margin = math.inf

    def lowest(self, scores: dict, drop: int) -> list:
        order = sorted(scores, key=scores.__getitem__)
        if 0 < drop < len(order) and scores[order[drop]] > 0:
            self.margin = min(self.margin, 1 - scores[order[drop - 1]] / scores[order[drop]])
        return order[:drop]

    def mask(self, scores: torch.Tensor, pattern, share: float = 1.0) -> torch.Tensor:
        """The pattern's zeros, of which only `share` with the lowest scores is made."""
        rows, columns = scores.shape
        places = {(i, j): float(scores[i, j]) for i in range(rows) for j in range(columns)}
        if isinstance(pattern, str):
            gone = self.lowest(places, math.floor(Fraction(pattern) * len(places)))
        else:
            gone = []
            n, m = pattern
            for i in range(rows):
                for start in range(0, columns, m):
                    width = min(m, columns - start)
                    group = {(i, j): places[i, j] for j in range(start, start + width)}
                    gone += self.lowest(group, width - math.ceil(Fraction(n * width, m)))
        if share < 1:
            gone = self.lowest({p: places[p] for p in gone}, math.floor(share * len(gone)))
        mask = torch.ones(rows, columns, dtype=torch.bool)
        for place in gone:
            mask[place] = False
        return mask


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    matrix = hessian.double().clone()
    for j in range(len(matrix)):
        if matrix[j, j] == 0:
            matrix[j, j] = 1
    return matrix + damp * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def better_rows(weight, other, target, hessian) -> torch.Tensor:
    rows = []
    for a, b, t in zip(weight, other, target, strict=True):
        rows.append(a if (a - t) @ hessian @ (a - t) < (b - t) @ hessian @ (b - t) else b)
    return torch.stack(rows)


def make_inputs(columns: int, dead: tuple[int, ...] = (), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + columns)
    inputs = torch.randn(3 * columns + 20, columns, generator=generator, dtype=torch.float64)
    inputs += 0.7 * torch.randn(len(inputs), 1, generator=generator, dtype=torch.float64)
    inputs *= torch.linspace(0.3, 3, columns, dtype=torch.float64)
    inputs[:, list(dead)] = 0
    return inputs


def make_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77 * seed + 1000 * rows + columns)
    return torch.randn(rows, columns, generator=generator)


def freeze(inputs: torch.Tensor) -> Statistics:
    hessian = (inputs.T @ inputs / len(inputs)).float()
    return Statistics(len(inputs), inputs[:4].float(), hessian.diagonal().sqrt(), hessian)


def parsed(pattern) -> Unstructured | NM:
    return Unstructured(float(pattern)) if isinstance(pattern, str) else NM(*pattern)
