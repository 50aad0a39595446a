"""Grids: scales, rounding and clipping, against loops over plain Python numbers."""

import math

import pytest
import torch

from hf_sparse.core import grids
from hf_sparse.core.grids import CLIPPING, Grid

GRIDS = [
    Grid(bits, size, sym) for bits in (8, 4, 3) for size in (None, 16, 7) for sym in (True, False)
]
every_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda g: f"{g.bits}-{g.group_size}-{'sym' if g.sym else 'asym'}"
)


def some_weight(rows=5, columns=37, seed=0):
    """Heavy-tailed, with a row and a group of zeros and a row of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3 / 50
    weight[1] = 0
    weight[2] = weight[2].abs()
    weight[3, :7] = 0
    return weight


def group_slices(columns, size):
    size = size or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def as_bf16(value):
    return float(torch.tensor(value, dtype=torch.float64).float().bfloat16())


def place(values, grid, ratio):
    """Scale and zero point of one group's range, by the definition."""
    low, high = min(0.0, *values), max(0.0, *values)
    if low == high:
        return 1.0, 0
    if grid.sym:
        return as_bf16(ratio * max(-low, high) / (2 ** (grid.bits - 1) - 1)), 0
    top = 2**grid.bits - 1
    scale = as_bf16(ratio * (high - low) / top)
    return scale, min(max(round(-low * ratio / scale), 0), top)


def limits(grid, zero):
    half = 2 ** (grid.bits - 1) - 1
    return (-half, half) if grid.sym else (-zero, 2**grid.bits - 1 - zero)


def nearest(value, grid, scale, zero):
    low, high = limits(grid, zero)
    return min(range(low, high + 1), key=lambda code: abs(code * scale - value))


def squared_error(values, factors, grid, scale, zero):
    return math.fsum(
        f * (nearest(v, grid, scale, zero) * scale - v) ** 2
        for v, f in zip(values, factors, strict=True)
    )


@every_grid
def test_the_full_range_gives_the_scales_of_the_definition(grid):
    weight = some_weight()
    scales = grid.fit(weight, search=False)
    slices = group_slices(37, grid.group_size)
    assert scales.scale.shape == (5, len(slices)) == (5, grid.groups(37))
    for row in range(5):
        for group, part in enumerate(slices):
            scale, zero = place(weight[row, part].tolist(), grid, 1.0)
            assert float(scales.scale[row, group]) == pytest.approx(scale, rel=2**-8)
            if grid.sym:
                assert scales.zero is None
            else:
                assert abs(int(scales.zero[row, group]) - zero) <= 1


@every_grid
def test_a_weight_is_rounded_to_the_nearest_point(grid):
    # Some lie beyond the ends of the grid.
    scales, weight = grid.fit(some_weight()), 1.7 * some_weight(seed=1)
    rounded = scales.round(weight)
    dense = rounded.dequantize()
    assert rounded.codes.dtype == torch.int16
    assert dense.dtype == torch.float32
    for row in range(5):
        for group, part in enumerate(group_slices(37, grid.group_size)):
            scale = float(scales.scale[row, group])
            zero = 0 if scales.zero is None else int(scales.zero[row, group])
            for j in range(part.start, part.stop):
                value, code = float(weight[row, j]), int(rounded.codes[row, j])
                low, high = limits(grid, zero)
                assert low <= code <= high
                best = abs(nearest(value, grid, scale, zero) * scale - value)
                assert abs(code * scale - value) == pytest.approx(best, abs=1e-6 * scale)
                assert float(dense[row, j]) == code * scale


@every_grid
def test_a_column_is_rounded_as_the_whole_is(grid):
    weight = some_weight()
    scales = grid.fit(weight)
    dense = scales.round(weight).dequantize()
    for j in range(37):
        scale, zero = scales.column(j)
        assert torch.equal(scales.round_column(weight[:, j], j), dense[:, j])
        group = j // (grid.group_size or 37)
        assert torch.equal(scale, scales.scale[:, group])
        assert zero is None if grid.sym else torch.equal(zero, scales.zero[:, group])


@every_grid
def test_zeros_stay_zeros_and_groups_of_zeros_get_scale_one(grid):
    weight = some_weight()
    scales = grid.fit(weight)
    dense = scales.round(weight).dequantize()
    assert bool((dense[weight == 0] == 0).all())
    assert bool((scales.scale[1] == 1).all())
    assert bool(scales.scale.isfinite().all())
    assert bool((scales.scale > 0).all())


@every_grid
def test_scales_and_zero_points_are_what_a_file_holds(grid):
    scales = grid.fit(some_weight())
    assert torch.equal(scales.scale, scales.scale.bfloat16().float())
    if scales.zero is not None:
        assert 0 <= int(scales.zero.min()) <= int(scales.zero.max()) <= 2**grid.bits - 1


@pytest.mark.parametrize("grid", [Grid(4, 16, True), Grid(3, None, False)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_finds_the_clipping_with_the_least_squared_error(grid, weighted):
    weight = some_weight(seed=2)
    importance = torch.linspace(4, 0, 37).exp() if weighted else None
    factors = importance if weighted else torch.ones(37)
    scales = grid.fit(weight, importance=importance)
    for row in range(5):
        for group, part in enumerate(group_slices(37, grid.group_size)):
            values, factor = weight[row, part].tolist(), factors[part].tolist()
            placed = [place(values, grid, ratio) for ratio in CLIPPING]
            least = min(squared_error(values, factor, grid, *place) for place in placed)
            scale = float(scales.scale[row, group])
            zero = 0 if scales.zero is None else int(scales.zero[row, group])
            found = squared_error(values, factor, grid, scale, zero)
            assert found == pytest.approx(least, rel=1e-4, abs=1e-12)


def test_clipping_pays_at_few_bits():
    weight = some_weight(seed=3)
    grid = Grid(3, None, True)
    errors = [
        float((grid.fit(weight, search=s).round(weight).dequantize() - weight).square().sum())
        for s in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_weights_that_are_not_kept_have_no_influence():
    weight = some_weight()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    louder = weight.where(mask, 100)
    grid = Grid(4, 16, False)
    one, other = grid.fit(weight, mask), grid.fit(louder, mask)
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.zero, other.zero)


def test_a_range_too_small_for_a_scale_counts_as_zero():
    weight = torch.full((1, 4), 1e-42)
    scales = Grid(8, None, True).fit(weight)
    assert float(scales.scale) == 1
    assert bool((scales.round(weight).codes == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_sixteen_bits_are_fitted_in_fp32(dtype):
    weight = some_weight().to(dtype)
    grid = Grid(4, 16, True)
    assert torch.equal(grid.fit(weight).scale, grid.fit(weight.float()).scale)


def test_the_arguments_are_left_alone():
    weight = some_weight()
    before = weight.clone()
    scales = Grid(4, None, False).fit(weight)
    scales.round(weight)
    scales.round_column(weight[:, 0], 0)
    assert torch.equal(weight, before)


@every_grid
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_the_native_search_finds_what_torch_finds(grid, weighted, monkeypatch):
    weight = some_weight(rows=40, columns=259)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    importance = weight.abs().mean(dim=0) if weighted else None
    found = grid.fit(weight, mask, importance)
    monkeypatch.setattr(grids, "library_for", lambda *tensors: None)
    expected = grid.fit(weight, mask, importance)
    assert torch.equal(found.scale, expected.scale)
    assert grid.sym or torch.equal(found.zero, expected.zero)
