"""`admm` against an oracle: the formulas of Boza 2024 as a plain loop in double precision."""

import math

import pytest
import torch
from layer_oracle import (
    Expected,
    Masks,
    better_rows,
    damped,
    freeze,
    make_inputs,
    make_weight,
    parsed,
)

from hf_sparse.errors import SolveError
from hf_sparse.patterns import Unstructured
from hf_sparse.solvers.admm import ADMM
from hf_sparse.statistics import Needs

SHAPES = [(1, 1), (4, 9), (6, 24), (5, 18)]
PATTERNS = ["0.5", "0.29", "0.9", (2, 4), (3, 5), (1, 4)]


def oracle(weight: torch.Tensor, hessian: torch.Tensor, pattern, damp: float = 0.01) -> Expected:
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


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_masks_and_weights_are_those_of_the_formulas(shape, pattern, damp):
    for seed in range(20):  # a near tie could fall either way in single precision
        weight, statistics = make_weight(*shape, seed), freeze(make_inputs(shape[1], seed=seed))
        expected = oracle(weight, statistics.hessian, pattern, damp)
        if expected.margin > 1e-4:
            break
    assert expected.margin > 1e-4
    solution = ADMM(damp_percent=damp).solve(weight, statistics, parsed(pattern))
    assert torch.equal(solution.mask, expected.mask)
    torch.testing.assert_close(solution.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (16, 130)], ids=str)
def test_no_row_is_worse_than_the_masked_weight_in_the_damped_metric(shape, sparsity):
    weight, statistics = make_weight(*shape), freeze(make_inputs(shape[1]))
    solution = ADMM().solve(weight, statistics, Unstructured(sparsity))
    matrix, target = damped(statistics.hessian, 0.01), weight.double()
    for row, kept, full in zip(solution.weight.double(), solution.mask, target, strict=True):
        masked = full * kept - full
        assert (row - full) @ matrix @ (row - full) <= masked @ matrix @ masked * (1 + 1e-5)


@pytest.mark.parametrize("pattern", ["0.5", (2, 4)], ids=str)
def test_the_result_is_clearly_closer_than_a_magnitude_mask(pattern):
    weight, statistics = make_weight(24, 96), freeze(make_inputs(96))
    solution = ADMM().solve(weight, statistics, parsed(pattern))
    plain = weight * parsed(pattern).mask(weight.abs())
    losses = []
    for candidate in (solution.weight, plain):
        difference = candidate.double() - weight.double()
        losses.append(float((difference @ statistics.hessian.double() * difference).sum()))
    assert losses[0] < 0.5 * losses[1]


@pytest.mark.parametrize("shape", [(9, 30), (33, 130)], ids=str)
@pytest.mark.parametrize("pattern", ["0.6", (2, 4)], ids=str)
def test_a_weight_stored_as_in_by_out_gives_the_same_bits(shape, pattern):
    weight, statistics = make_weight(*shape), freeze(make_inputs(shape[1]))
    stored = weight.T.contiguous()
    plain = ADMM().solve(weight, statistics, parsed(pattern))
    viewed = ADMM().solve(stored.T, statistics, parsed(pattern))
    assert torch.equal(viewed.mask, plain.mask)
    assert torch.equal(viewed.weight, plain.weight)


def test_a_dead_input_counts_as_one_of_unit_size():
    weight, statistics = make_weight(6, 24), freeze(make_inputs(24, dead=(2, 9)))
    expected = oracle(weight, statistics.hessian, "0.5")
    assert expected.margin > 1e-4
    solution = ADMM().solve(weight, statistics, Unstructured(0.5))
    assert torch.equal(solution.mask, expected.mask)
    torch.testing.assert_close(solution.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


def test_what_is_kept_of_a_dead_input_keeps_its_value():
    weight, statistics = make_weight(6, 20), freeze(make_inputs(20, dead=(0, 7)))
    solution = ADMM().solve(weight, statistics, Unstructured(0.3))
    kept = solution.mask[:, [0, 7]]
    assert kept.any()
    torch.testing.assert_close(
        solution.weight[:, [0, 7]][kept], weight[:, [0, 7]][kept], rtol=1e-5, atol=1e-6
    )


def test_rows_of_zeros_stay_zero():
    weight, statistics = make_weight(6, 20), freeze(make_inputs(20))
    weight[[1, 4]] = 0
    solution = ADMM().solve(weight, statistics, Unstructured(0.5))
    assert not solution.weight[[1, 4]].any()
    assert int((~solution.mask).sum()) == 60


def test_a_hessian_that_is_not_finite_is_an_error():
    statistics = freeze(make_inputs(8))
    statistics.hessian[2, 1] = statistics.hessian[1, 2] = math.nan
    with pytest.raises(SolveError, match="NaN or infinite"):
        ADMM().solve(make_weight(3, 8), statistics, Unstructured(0.5))


def test_admm_asks_for_the_hessian():
    assert ADMM.needs is Needs.HESSIAN
