"""The values that a merged layer has on its pattern."""

import pytest
import torch

from hf_sparse.core.grids import Grid
from hf_sparse.formats import Bitmask, Quantized
from hf_sparse.training.merging.values import values_on_pattern

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.randn(6, 16, generator=GENERATOR)
MASK = torch.rand(6, 16, generator=GENERATOR) > 0.5
X = torch.randn(40, 16, generator=GENERATOR) @ torch.randn(16, 16, generator=GENERATOR)
HESSIAN = X.T @ X / len(X) + 0.1 * torch.eye(16)


def test_masked_takes_the_targets_values():
    solution = values_on_pattern(TARGET, MASK, Bitmask(), torch.float32)
    assert torch.equal(solution.weight, TARGET * MASK)


def test_resolved_values_are_the_least_squares_solution_on_the_pattern():
    found = values_on_pattern(TARGET, MASK, Bitmask(), torch.float32, HESSIAN, 100).weight
    hessian, target = HESSIAN.double(), TARGET.double()
    for row in range(6):
        kept = MASK[row].nonzero().flatten()
        values = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ target[row])
        torch.testing.assert_close(found[row, kept].double(), values, rtol=1e-3, atol=1e-4)
    assert torch.equal(found != 0, MASK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_stays_kept_where_the_target_is_zero_or_underflows(dtype):
    target = TARGET.clone()
    target[:, :4], target[:, 4:8] = 0, 1e-45
    solution = values_on_pattern(target, MASK, Bitmask(), dtype)
    assert solution.weight.dtype == dtype
    assert torch.equal(solution.weight != 0, MASK)
    assert float(solution.weight[:, :8].abs().max()) < 1e-4


@pytest.mark.parametrize("hessian", [None, HESSIAN])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_kept_codes_are_never_zero_and_on_their_own_side(bits, sym, hessian):
    target = TARGET.clone()
    target[0] = target[0].abs()  # an asymmetric grid then has nothing below 0
    target[1] = -target[1].abs()
    target[:, ::3] *= 1e-3
    fmt = Quantized(Grid(bits, 8, sym), Bitmask())
    solution = values_on_pattern(target, MASK, fmt, torch.float32, hessian, 20)
    quantized = solution.quantized
    assert torch.equal(quantized.codes != 0, MASK)
    assert torch.equal(solution.weight, quantized.dequantize())
    unpacked = fmt.quantized(fmt.pack(quantized), (6, 16))
    fmt.check(fmt.pack(quantized), (6, 16))
    assert torch.equal(unpacked.codes, quantized.codes)
    if hessian is None:
        steps = quantized.scales.scale.repeat_interleave(8, dim=1)
        near = MASK & (target.abs() < steps)
        beside = near & has_points_beside(quantized.scales, target)
        errors = (solution.weight - target).abs()
        assert bool((errors[beside] <= 1.01 * steps[beside]).all())
        assert bool((errors[near] <= 2.01 * steps[near]).all())
        assert torch.equal(target.sign()[beside], solution.weight.sign()[beside])


def has_points_beside(scales, target):
    """Where the grid goes on from 0 on the side of the target."""
    if scales.zero is None:
        return torch.ones_like(MASK)
    zero = scales.zero.repeat_interleave(8, dim=1)
    return torch.where(target < 0, zero > 0, zero < scales.grid.levels)
