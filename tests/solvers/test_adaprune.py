"""`adaprune` against loops and exact least squares, in double precision."""

import math

import pytest
import torch

from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.solvers.adaprune import AdaPrune

PATTERNS = [Unstructured(0.29), Unstructured(0.5), Unstructured(0.9), NM(2, 4), NM(4, 8), NM(3, 5)]

every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=[f"{pattern}-{pattern.sparsity:g}" for pattern in PATTERNS]
)


def make_inputs(columns: int, tokens: int, kind: str = "correlated") -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = mixed + 0.5 * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    if kind == "uneven":
        inputs *= torch.logspace(-3, 3, columns)[torch.randperm(columns, generator=generator)]
    elif kind == "nearly equal":
        inputs = 1 + 1e-3 * inputs
    return inputs


def make_weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    scale = torch.linspace(0.2, 3, rows).unsqueeze(1)
    return torch.randn(rows, columns, generator=generator) * scale


def freeze(inputs: torch.Tensor) -> Statistics:
    hessian = (inputs.T @ inputs / len(inputs)).float()
    return Statistics(len(inputs), inputs.float(), hessian.diagonal().sqrt(), hessian)


def row_losses(before: torch.Tensor, after: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """||X (w - w^)||^2 of each row, from the inputs themselves."""
    return (inputs @ (before - after).double().T).square().sum(dim=0)


def least_squares(weight: torch.Tensor, mask: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The best weights on a mask, row by row."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for i, kept in enumerate(mask):
        target = inputs @ weight[i].double()
        best[i, kept] = torch.linalg.lstsq(inputs[:, kept], target).solution
    return best


def smallest(weight: torch.Tensor, pattern: Unstructured | NM) -> torch.Tensor:
    """True where magnitude pruning keeps, by sorting: of the layer, or of each group."""
    rows, columns = weight.shape
    places = [(i, j) for i in range(rows) for j in range(columns)]
    if isinstance(pattern, Unstructured):
        groups = {0: places}
        drop = {0: round(pattern.sparsity * 100) * len(places) // 100}
    else:
        groups = {}
        for i, j in places:
            groups.setdefault((i, j // pattern.m), []).append((i, j))
        drop = {k: len(g) - math.ceil(pattern.n * len(g) / pattern.m) for k, g in groups.items()}
    mask = torch.ones_like(weight, dtype=torch.bool)
    for key, group in groups.items():
        for place in sorted(group, key=lambda place: abs(float(weight[place])))[: drop[key]]:
            mask[place] = False
    return mask


@every_pattern
@pytest.mark.parametrize("shape", [(3, 16), (8, 33)], ids=str)
def test_the_smallest_weights_go_whatever_the_inputs_are(shape, pattern):
    weight = make_weight(*shape)
    solution = AdaPrune().solve(weight, freeze(make_inputs(shape[1], 90, "uneven")), pattern)
    assert torch.equal(solution.mask, smallest(weight, pattern))
    assert torch.equal(solution.weight != 0, solution.mask)


@every_pattern
@pytest.mark.parametrize("tokens", [12, 150])
@pytest.mark.parametrize("kind", ["correlated", "uneven", "nearly equal"])
def test_no_row_ends_worse_than_it_began(kind, tokens, pattern):
    weight, inputs = make_weight(10, 48), make_inputs(48, tokens, kind)
    solution = AdaPrune().solve(weight, freeze(inputs), pattern)
    start = row_losses(weight, weight * solution.mask, inputs)
    end = row_losses(weight, solution.weight, inputs)
    assert bool((end <= start * (1 + 1e-5)).all())
    assert end.sum() < 0.9 * start.sum()


@pytest.mark.parametrize("rate", [10.0, 1e6])
def test_steps_that_only_make_it_worse_leave_the_start(monkeypatch, rate):
    monkeypatch.setattr(AdaPrune, "RATE", rate)
    monkeypatch.setattr(AdaPrune, "STEPS", 2)
    weight, inputs = make_weight(6, 32), make_inputs(32, 80)
    solution = AdaPrune().solve(weight, freeze(inputs), Unstructured(0.5))
    assert torch.equal(solution.weight, weight * solution.mask)


@every_pattern
def test_training_comes_close_to_the_best_weights_on_the_mask(pattern):
    weight, inputs = make_weight(10, 48), make_inputs(48, 150)
    solution = AdaPrune().solve(weight, freeze(inputs), pattern)
    best = least_squares(weight, solution.mask, inputs)
    start = row_losses(weight, weight * solution.mask, inputs)
    gained = start - row_losses(weight, solution.weight, inputs)
    possible = start - row_losses(weight, best, inputs)
    assert gained.sum() > 0.99 * possible.sum()


@pytest.mark.parametrize(("weights", "inputs"), [(1e-4, 1.0), (1.0, 1e-3), (50.0, 200.0)])
def test_neither_the_size_of_weights_nor_of_inputs_matters(weights, inputs):
    weight, sample = make_weight(6, 32), make_inputs(32, 80)
    plain = AdaPrune().solve(weight, freeze(sample), NM(2, 4)).weight
    scaled = AdaPrune().solve(weight * weights, freeze(sample * inputs), NM(2, 4)).weight
    torch.testing.assert_close(scaled / weights, plain, rtol=0, atol=5e-3)


def test_what_is_kept_of_dead_inputs_keeps_its_value():
    weight, inputs = make_weight(6, 20), make_inputs(20, 60)
    inputs[:, [2, 7, 19]] = 0
    solution = AdaPrune().solve(weight, freeze(inputs), Unstructured(0.5))
    kept = solution.mask[:, [2, 7, 19]]
    assert bool(kept.any())
    assert torch.equal(solution.weight[:, [2, 7, 19]][kept], weight[:, [2, 7, 19]][kept])


def test_rows_of_zeros_stay_zero():
    weight = make_weight(4, 16)
    weight[1] = 0
    solution = AdaPrune().solve(weight, freeze(make_inputs(16, 40)), NM(2, 4))
    assert not solution.weight[1].any()
    assert bool(torch.isfinite(solution.weight).all())


def test_adaprune_asks_for_the_hessian():
    assert AdaPrune.needs is Needs.HESSIAN
