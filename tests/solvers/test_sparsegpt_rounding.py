"""`sparsegpt` with a grid against column after column in double precision, and what it gains.

The oracle eliminates one column after the other over the full width and rounds with plain numbers;
only where the scales lie is taken from `Grid.fit`, which has tests of its own.
"""

import math
from fractions import Fraction

import pytest
import torch
from layer_oracle import damped

from hf_sparse.core.grids import Grid
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Statistics
from hf_sparse.solvers import SparseGPT

GRIDS = [
    Grid(4, 128, True), Grid(4, None, True), Grid(3, 32, False), Grid(8, 48, True),
    Grid(4, 20, False), Grid(3, 200, True),
]  # fmt: skip
PATTERNS = [Unstructured(0.5), Unstructured(0.0), NM(2, 4), NM(4, 8), NM(3, 5)]
every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda p: f"{p}-{float(p.sparsity):g}"
)
every_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda g: f"{g.bits}-{g.group_size}-{'sym' if g.sym else 'asym'}"
)


def problem(rows, columns, seed=0, dead=()):
    generator = torch.Generator().manual_seed(1000 * seed + rows + columns)
    inputs = torch.randn(2 * columns + 40, columns, generator=generator, dtype=torch.float64)
    inputs += 0.5 * torch.randn(len(inputs), 1, generator=generator, dtype=torch.float64)
    inputs[:, list(dead)] = 0
    hessian = (inputs.T @ inputs / len(inputs)).float()
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Statistics(len(inputs), inputs.float(), None, hessian)


def lowest(scores, drop):
    """True except for the `drop` lowest of a list of places."""
    return set(sorted(scores, key=scores.__getitem__)[:drop])


def oracle(weight, hessian, pattern, grid, block):
    """Codes and mask, column by column in float64."""
    dead = {j for j in range(len(hessian)) if hessian[j, j] == 0}
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, 0.01))).T
    work = weight.double().clone()
    rows, columns = work.shape
    size = grid.group_size or columns
    gone, codes = set(), torch.zeros(rows, columns, dtype=torch.int16)

    def score(row, j):
        return 0.0 if j in dead else float((work[row, j] / upper[j, j]) ** 2)

    def places(some_rows, start, end):
        return {(row, j): score(row, j) for row in some_rows for j in range(start, end)}

    for i in range(columns):
        if isinstance(pattern, Unstructured) and i % block == 0:
            end, share = min(i + block, columns), Fraction(str(pattern.sparsity)) * rows
            gone |= lowest(
                places(range(rows), i, end), math.floor(share * end) - math.floor(share * i)
            )
        elif isinstance(pattern, NM) and i % pattern.m == 0:
            end = min(i + pattern.m, columns)
            drop = end - i - math.ceil(Fraction(pattern.n * (end - i), pattern.m))
            for row in range(rows):
                gone |= lowest(places([row], i, end), drop)
        if i % size == 0:
            end = min(i + size, columns)
            scores = torch.tensor([[score(row, j) for j in range(i, end)] for row in range(rows)])
            kept = pattern.mask(scores)
            scales = Grid(grid.bits, None, grid.sym).fit(work[:, i:end].float(), kept, search=False)
        for row in range(rows):
            value, code = float(work[row, i]), 0
            scale = float(scales.scale[row, 0])
            if (row, i) not in gone:
                zero = 2 ** (grid.bits - 1) if grid.sym else int(scales.zero[row, 0])
                low = 1 - zero if grid.sym else -zero
                code = min(max(round(value / scale), low), 2**grid.bits - 1 - zero)
            codes[row, i] = code
            work[row, i:] -= (value - code * scale) / upper[i, i] * upper[i, i:]
            work[row, i] = code * scale
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for place in gone:
        mask[place] = False
    return codes, mask, work


@every_pattern
@every_grid
@pytest.mark.parametrize("block", [128, 40])
def test_codes_and_masks_are_those_of_column_after_column(pattern, grid, block):
    weight, statistics = problem(4, 150, dead=(3, 77))
    solver = SparseGPT(0.01, block, grid)
    solution = solver.solve(weight, statistics, pattern)
    blocks = block if isinstance(pattern, Unstructured) else -(-block // pattern.m) * pattern.m
    codes, mask, work = oracle(weight, statistics.hessian, pattern, grid, blocks)
    assert solution.quantized is not None
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.quantized.codes, codes)
    torch.testing.assert_close(solution.weight.double(), work, rtol=1e-6, atol=0)


@every_pattern
@every_grid
def test_the_weight_is_what_the_codes_say_and_zero_where_the_mask_says(pattern, grid):
    weight, statistics = problem(9, 70)
    before = weight.clone()
    solver = SparseGPT(joint_grid=grid)
    solution = solver.solve(weight, statistics, pattern)
    assert torch.equal(weight, before)
    assert torch.equal(solution.weight, solution.quantized.dequantize())
    assert not solution.weight[~solution.mask].any()
    assert solution.quantized.scales.grid == grid
    assert solution.quantized.scales.scale.shape == (9, grid.groups(70))
    if isinstance(pattern, Unstructured):
        assert int((~solution.mask).sum()) == pattern.zeros(9 * 70)
    else:
        assert int(solution.mask[:, : pattern.m].sum()) == 9 * pattern.n


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_rounding_in_the_same_pass_loses_less_than_rounding_afterwards(pattern):
    # Inputs of few directions: what one column loses, others can make up for.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(32, 128, generator=generator)
    inputs = torch.randn(512, 32, generator=generator) @ directions / 32**0.5
    inputs += 0.3 * torch.randn(512, 128, generator=generator)
    statistics = Statistics(512, inputs, None, inputs.T @ inputs / 512)
    weight, grid = torch.randn(64, 128, generator=generator), Grid(3, 32, True)
    joint = SparseGPT(joint_grid=Grid(3, 32, True)).solve(weight, statistics, pattern).weight
    pruned = SparseGPT().solve(weight, statistics, pattern)
    assert pruned.quantized is None
    scales = grid.fit(pruned.weight, pruned.mask, statistics.hessian.diagonal(), search=False)
    after = scales.round(pruned.weight).dequantize()
    errors = [statistics.relative_error(weight, w) for w in (joint, after)]
    assert errors[0] < 0.95 * errors[1]


def test_without_bits_nothing_is_rounded():
    weight, statistics = problem(5, 40)
    solution = SparseGPT().solve(weight, statistics, Unstructured(0.5))
    assert solution.quantized is None
