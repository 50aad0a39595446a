"""`admm` and `alps`, which pull the weight and a sparse copy of it together, against oracles.

The oracles are the papers' formulas as plain loops in double precision.
"""

import math
from fractions import Fraction

import pytest
import torch
from layer_oracle import Expected, damped, freeze, hessian_of, make_inputs, make_weight, parsed

from hf_sparse.core.errors import SolveError
from hf_sparse.core.patterns import Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.solvers.admm import ADMM
from hf_sparse.solvers.alps import ALPS

SHAPES = [(1, 1), (4, 9), (6, 24), (5, 18)]
PATTERNS = ["0.5", "0.29", "0.9", (2, 4), (3, 5), (1, 4)]


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


def better_rows(weight, other, target, hessian) -> torch.Tensor:
    rows = []
    for a, b, t in zip(weight, other, target, strict=True):
        rows.append(a if (a - t) @ hessian @ (a - t) < (b - t) @ hessian @ (b - t) else b)
    return torch.stack(rows)


def admm(weight: torch.Tensor, hessian: torch.Tensor, pattern, damp: float = 0.01) -> Expected:
    """Boza 2024."""
    matrix, target, masks = damped(hessian, damp), weight.double(), Masks()
    scale = matrix.diagonal().sqrt()
    normal = matrix / scale / scale.unsqueeze(1)
    inverse = torch.linalg.inv(normal + torch.eye(len(normal), dtype=torch.float64))
    w = target * scale
    goal, u = w @ normal, torch.zeros_like(w)
    for t in range(20):
        v = w + u
        if t < 15:
            share = 1.0 if t == 14 else 1 - (1 - (t + 1) / 15) ** 3
            mask = masks.mask(v.abs(), pattern, share)
        z = v * mask
        u = v - z
        w = (goal + z - u) @ inverse
    return Expected(better_rows(z / scale, target * mask, target, matrix), mask, masks.margin)


def alps(weight: torch.Tensor, hessian: torch.Tensor, pattern, damp: float = 0.01) -> Expected:
    """Meng et al. 2024."""
    matrix, target, masks = damped(hessian, damp), weight.double(), Masks()
    scale = matrix.diagonal().sqrt()
    normal = matrix / scale / scale.unsqueeze(1)
    identity = torch.eye(len(normal), dtype=torch.float64)
    goal = target * scale @ normal
    d, y, rho = target * scale, torch.zeros_like(target), 0.1
    support = {(i, j) for i in range(len(d)) for j in range(len(normal))}
    for t in range(1, 43):
        w = (goal - y + rho * d) @ torch.linalg.inv(normal + rho * identity)
        mask = masks.mask((w + y / rho).abs(), pattern)
        d = (w + y / rho) * mask
        y = y + rho * (w - d)
        if t % 3 == 0:
            now = {tuple(place) for place in mask.nonzero().tolist()}
            changed = len(now - support) / max(1, len(now))
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            support = now
    return Expected(better_rows(d / scale, target * mask, target, matrix), mask, masks.margin)


ORACLES = {ADMM: admm, ALPS: alps}
both = pytest.mark.parametrize("solver", ORACLES, ids=lambda cls: cls.name)


def statistics_of(columns: int, dead: tuple[int, ...] = (), seed: int = 0) -> Statistics:
    """Of inputs whose sizes differ."""
    inputs = make_inputs(columns, dead, seed, tokens=3 * columns + 20, common=0.7)
    return freeze(hessian_of(inputs * torch.linspace(0.3, 3, columns, dtype=torch.float64)))


@both
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_masks_and_weights_are_those_of_the_formulas(solver, shape, pattern, damp):
    for seed in range(20):  # a near tie could fall either way in single precision
        weight, statistics = make_weight(*shape, seed), statistics_of(shape[1], seed=seed)
        expected = ORACLES[solver](weight, statistics.hessian, pattern, damp)
        if expected.margin > 1e-4:
            break
    assert expected.margin > 1e-4
    solution = solver(damping=damp).solve(weight, statistics, parsed(pattern))
    assert torch.equal(solution.mask, expected.mask)
    torch.testing.assert_close(solution.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


@both
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (16, 130)], ids=str)
def test_no_row_is_worse_than_the_masked_weight_in_the_damped_metric(solver, shape, sparsity):
    weight, statistics = make_weight(*shape), statistics_of(shape[1])
    solution = solver().solve(weight, statistics, Unstructured(sparsity))
    matrix, target = damped(statistics.hessian, 0.01), weight.double()
    for row, kept, full in zip(solution.weight.double(), solution.mask, target, strict=True):
        masked = full * kept - full
        assert (row - full) @ matrix @ (row - full) <= masked @ matrix @ masked * (1 + 1e-5)


@both
@pytest.mark.parametrize("pattern", ["0.5", (2, 4)], ids=str)
def test_the_result_is_clearly_closer_than_a_magnitude_mask(solver, pattern):
    weight, statistics = make_weight(24, 96), statistics_of(96)
    solution = solver().solve(weight, statistics, parsed(pattern))
    plain = weight * parsed(pattern).mask(weight.abs())
    losses = []
    for candidate in (solution.weight, plain):
        difference = candidate.double() - weight.double()
        losses.append(float((difference @ statistics.hessian.double() * difference).sum()))
    assert losses[0] < 0.5 * losses[1]


@both
@pytest.mark.parametrize("shape", [(9, 30), (33, 130)], ids=str)
@pytest.mark.parametrize("pattern", ["0.6", (2, 4)], ids=str)
def test_a_weight_stored_as_in_by_out_gives_the_same_bits(solver, shape, pattern):
    weight, statistics = make_weight(*shape), statistics_of(shape[1])
    stored = weight.T.contiguous()
    plain = solver().solve(weight, statistics, parsed(pattern))
    viewed = solver().solve(stored.T, statistics, parsed(pattern))
    assert torch.equal(viewed.mask, plain.mask)
    assert torch.equal(viewed.weight, plain.weight)


@both
def test_a_dead_input_counts_as_one_of_unit_size(solver):
    weight, statistics = make_weight(6, 24), statistics_of(24, dead=(2, 9))
    expected = ORACLES[solver](weight, statistics.hessian, "0.5")
    assert expected.margin > 1e-4
    solution = solver().solve(weight, statistics, Unstructured(0.5))
    assert torch.equal(solution.mask, expected.mask)
    torch.testing.assert_close(solution.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


@both
def test_what_is_kept_of_a_dead_input_keeps_its_value(solver):
    weight, statistics = make_weight(6, 20), statistics_of(20, dead=(0, 7))
    solution = solver().solve(weight, statistics, Unstructured(0.3))
    kept = solution.mask[:, [0, 7]]
    assert kept.any()
    torch.testing.assert_close(
        solution.weight[:, [0, 7]][kept], weight[:, [0, 7]][kept], rtol=1e-5, atol=1e-6
    )


@both
def test_rows_of_zeros_stay_zero(solver):
    weight, statistics = make_weight(6, 20), statistics_of(20)
    weight[[1, 4]] = 0
    solution = solver().solve(weight, statistics, Unstructured(0.5))
    assert not solution.weight[[1, 4]].any()
    assert int((~solution.mask).sum()) == 60


@both
def test_a_hessian_that_is_not_finite_is_an_error(solver):
    statistics = statistics_of(8)
    statistics.hessian[2, 1] = statistics.hessian[1, 2] = math.nan
    with pytest.raises(SolveError, match="NaN or infinite"):
        solver().solve(make_weight(3, 8), statistics, Unstructured(0.5))


@both
def test_fewer_tokens_than_inputs_are_enough(solver):
    statistics = freeze(hessian_of(make_inputs(40, tokens=5)))
    solution = solver().solve(make_weight(6, 40), statistics, Unstructured(0.5))
    assert bool(torch.isfinite(solution.weight).all())
    assert int((~solution.mask).sum()) == 120


@both
def test_it_asks_for_the_hessian(solver):
    assert solver.needs is Needs.HESSIAN


def test_an_eigendecomposition_that_fails_is_an_error_that_says_what_to_do(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(SolveError, match=r"did not converge.*damping.*admm"):
        ALPS().solve(make_weight(3, 8), statistics_of(8), Unstructured(0.5))
