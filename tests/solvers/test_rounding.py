"""Coordinate descent on a grid, against a plain loop over single weights in double precision."""

import pytest
import torch
from layer_oracle import loss

from hf_sparse.core.grids import Grid
from hf_sparse.solvers.refinement.rounding import BLOCK, SWEEPS, quantize

GRIDS = [Grid(4, 16, True), Grid(3, None, True), Grid(4, 16, False), Grid(8, 32, True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def problem(rows: int, columns: int, seed: int = 0):
    """A pruned weight, its mask and a Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) > 0.4
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs @ (torch.eye(columns) + 0.7 * torch.rand(columns, columns, generator=generator))
    hessian = inputs.T @ inputs / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return weight * mask, mask, hessian


def loop(target, mask, scales, hessian):
    """The best grid point of one weight after the other, all others fixed."""
    value = scales.round(target).dequantize().double()
    target, hessian = target.double(), hessian.double()
    levels = scales.grid.levels
    for _ in range(SWEEPS):
        for j in range(target.shape[1]):
            scale, zero = scales.column(j)
            for i in range(target.shape[0]):
                if not mask[i, j]:
                    continue
                slope = float((value[i] - target[i]) @ hessian[:, j])
                wanted = float(value[i, j]) - slope / float(hessian[j, j])
                low = -(levels // 2) if zero is None else -int(zero[i])
                code = min(max(round(wanted / float(scale[i])), low), low + levels)
                value[i, j] = code * float(scale[i])
    return value


@every_grid
def test_points_are_those_of_a_loop_over_single_weights(grid):
    target, mask, hessian = problem(5, BLOCK + 13)
    found = quantize(target, mask, grid, hessian)
    expected = loop(target, mask, found.scales, hessian)
    # fp32 may see two points equally far away: such a weight, and what follows it, may differ.
    ours, theirs = loss(found.dequantize(), target, hessian), loss(expected, target, hessian)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert (found.dequantize() == expected.float()).double().mean() > 0.9


@every_grid
@pytest.mark.parametrize("seed", range(3))
def test_it_is_closer_than_the_nearest_points(grid, seed):
    target, mask, hessian = problem(24, 150, seed)
    found = quantize(target, mask, grid, hessian)
    nearest = found.scales.round(target).dequantize()
    assert loss(found.dequantize(), target, hessian) < 0.9 * loss(nearest, target, hessian)


@every_grid
def test_what_is_pruned_stays_zero(grid):
    target, mask, hessian = problem(16, 96)
    assert not bool(quantize(target, mask, grid, hessian).codes[~mask].any())


def test_without_a_hessian_every_weight_goes_to_its_nearest_point():
    target, mask, _ = problem(7, 40)
    grid = Grid(4, 8, True)
    found = quantize(target, mask, grid, None).dequantize()
    for i in range(7):
        for j in range(40):
            scale = grid.fit(target, mask).column(j)[0][i]
            points = torch.arange(-7, 8) * scale
            assert abs(found[i, j] - target[i, j]) <= (points - target[i, j]).abs().min() + 1e-6


def test_a_weight_that_lies_on_its_grid_is_left_alone():
    _, mask, hessian = problem(6, 48)
    grid = Grid(4, None, True)
    codes = torch.randint(-7, 8, (6, 48), generator=torch.Generator().manual_seed(1)) * mask
    codes[:, 0], mask[:, 0] = 7, True
    target = codes.float() * 0.25
    assert torch.equal(quantize(target, mask, grid, hessian).dequantize(), target)
