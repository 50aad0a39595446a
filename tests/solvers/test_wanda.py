"""`wanda` against plain loops: |W_ij| times the input's norm, compared within each row."""

import math

import pytest
import torch

from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.solvers.wanda import Wanda


def make_case(out: int, columns: int, tokens: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * out + columns)
    weight = torch.randn(out, columns, generator=generator)
    # Inputs of very different sizes: a mask by |W| alone would be another one.
    scale = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return weight, torch.randn(tokens, columns, generator=generator) * scale


def statistics_of(inputs: torch.Tensor) -> Statistics:
    squares = [sum(float(x) ** 2 for x in column) / len(inputs) for column in inputs.T]
    norms = torch.tensor([math.sqrt(square) for square in squares])
    return Statistics(len(inputs), inputs, norms, None)


def lowest(scores: list[float], drop: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: scores[j])[:drop])


def loop_mask(weight, inputs, groups_of: int | None, drop_of) -> list[list[bool]]:
    """The mask by loops in double precision; a group is a whole row if `groups_of` is None."""
    norms = [math.sqrt(sum(float(x) ** 2 for x in column)) for column in inputs.T]
    mask = []
    for row in weight.tolist():
        kept = [True] * len(row)
        width = groups_of or len(row)
        for start in range(0, len(row), width):
            scores = [abs(w) * c for w, c in zip(row[start:], norms[start:], strict=True)][:width]
            for j in lowest(scores, drop_of(len(scores))):
                kept[start + j] = False
        mask.append(kept)
    return mask


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 33), (5, 128)])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_each_row_loses_its_lowest_products_and_the_rest_stays_as_it_is(shape, sparsity):
    weight, inputs = make_case(*shape)
    solution = Wanda().solve(weight, statistics_of(inputs), Unstructured(sparsity))
    percent = round(sparsity * 100)
    expected = loop_mask(weight, inputs, None, lambda n: percent * n // 100)
    assert solution.mask.tolist() == expected
    assert torch.equal(solution.weight, weight * torch.tensor(expected))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("shape", [(3, 16), (4, 21), (2, 3)])
def test_each_group_keeps_its_highest_products(shape, n, m):
    weight, inputs = make_case(*shape)
    solution = Wanda().solve(weight, statistics_of(inputs), NM(n, m))
    expected = loop_mask(weight, inputs, m, lambda t: t - math.ceil(n * t / m))
    assert solution.mask.tolist() == expected
    assert torch.equal(solution.weight, weight * torch.tensor(expected))


def test_inputs_that_are_always_zero_lose_their_weights_first():
    weight, inputs = make_case(4, 10)
    inputs[:, [2, 7]] = 0
    solution = Wanda().solve(weight * 100, statistics_of(inputs), Unstructured(0.2))
    dropped = sorted({int(j) for j in (~solution.mask).nonzero()[:, 1]})
    assert dropped == [2, 7]


def test_wanda_asks_for_column_norms_only():
    assert Wanda.needs is Needs.COLUMN_NORMS
