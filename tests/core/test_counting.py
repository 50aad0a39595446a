"""Counts and selections over whole weights are right whatever the dtype and strides."""

import pytest
import torch

from hf_sparse.core.counting import (
    all_finite,
    at_most,
    count_true,
    count_true_per_row,
    count_zeros,
    kept_values,
    zero_outside,
)
from hf_sparse.core.shapes import BLOCK_WEIGHTS, row_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int16, torch.uint8]


def weight_and_mask(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A transposed view with zeros of both signs, and a mask of half of it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 4, (37, 11), generator=generator).to(dtype)
    weight[3] = -weight[3]
    return weight.T, torch.rand(37, 11, generator=generator).T > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_counted_of_either_sign_and_across_blocks(dtype):
    weight, _ = weight_and_mask(dtype)
    assert count_zeros(weight) == sum(value == 0 for row in weight.tolist() for value in row)
    long = torch.ones(BLOCK_WEIGHTS + 3, dtype=dtype)
    long[[0, BLOCK_WEIGHTS - 1, BLOCK_WEIGHTS]] = 0
    assert count_zeros(long) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_values_follow_in_the_order_of_rows(dtype):
    weight, mask = weight_and_mask(dtype)
    pairs = zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True)
    kept = kept_values(weight, mask)
    assert kept.dtype == dtype
    assert kept.tolist() == [value for value, stays in pairs if stays]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_outside_of_the_mask_becomes_plus_zero_in_a_copy(dtype):
    weight, mask = weight_and_mask(dtype)
    before = weight.clone()
    result = zero_outside(weight, mask)
    assert torch.equal(weight, before)
    assert torch.equal(result, weight.where(mask, torch.zeros((), dtype=dtype)))
    assert not result[~mask].to(torch.float64).signbit().any()


def test_true_values_are_counted_whole_and_by_row():
    _, mask = weight_and_mask(torch.float32)
    assert count_true(mask) == sum(map(sum, mask.tolist()))
    assert count_true_per_row(mask).tolist() == [sum(row) for row in mask.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_compared_with_its_own_limit_and_nan_is_never_below(dtype):
    values = torch.tensor([[1.0, 2.0, float("nan")], [-1.0, -2.0, -3.0]], dtype=dtype)
    limit = torch.tensor([[1.0], [-2.0]], dtype=dtype)
    assert at_most(values, limit).tolist() == [[True, False, False], [False, True, True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(bad, dtype):
    values = torch.zeros(5, 7, dtype=dtype)
    assert all_finite(values)
    values[2, 3] = bad
    assert not all_finite(values)
    assert all_finite(values[:0])


def test_row_blocks_cover_every_row_once():
    for shape in [(5, 3), (3, BLOCK_WEIGHTS * 2), (7, BLOCK_WEIGHTS // 2), (0, 4)]:
        rows = [
            row
            for block in row_blocks(shape, torch.device("cpu"))
            for row in range(shape[0])[block]
        ]
        assert rows == list(range(shape[0]))
