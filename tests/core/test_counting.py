"""Counts and selections over whole weights are right whatever the dtype and strides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.core import native
from hf_sparse.core.bits import nonzero_bits
from hf_sparse.core.counting import (
    all_finite,
    at_most,
    count_true,
    count_true_per_row,
    count_zeros,
    keep_highest,
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
    kept = kept_values(weight, nonzero_bits(mask))
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


@pytest.fixture(params=["library", "numpy"])
def either(request, monkeypatch):
    """With the native library and without."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "find", lambda: "no library")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (4, 33), (2, 4099), (0, 5), (5, 0)])
@pytest.mark.usefixtures("either")
def test_bits_values_and_zeros_agree_with_numpy(dtype, shape):
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if dtype.is_floating_point:
        weight[torch.rand(shape, generator=generator) < 0.3] = -0.0
    nonzero = weight.double().numpy() != 0
    bits = nonzero_bits(weight)
    assert bits.tolist() == np.packbits(nonzero, axis=1, bitorder="little").tolist()
    assert kept_values(weight, bits).tolist() == weight.double().numpy()[nonzero].tolist()
    assert count_zeros(weight) == nonzero.size - nonzero.sum()
    result = zero_outside(weight, torch.from_numpy(nonzero))
    assert result.tolist() == np.where(nonzero, weight.double().numpy(), 0).tolist()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    n=st.one_of(st.integers(1, 40), st.integers(500, 2100)),
    kinds=st.sampled_from([2, 7, 10**6]),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_lowest_go_and_of_equal_ones_the_earlier(rows, n, kinds, share, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(-kinds, kinds, (rows, n)) / kinds * 10.0 ** random.integers(-30, 30)
    scores = scores.astype(np.float32)
    scores[random.random((rows, n)) < 0.05] = np.inf
    scores[random.random((rows, n)) < 0.05] = -0.0
    drop = max(1, round(share * n))
    expected = np.ones((rows, n), dtype=bool)
    np.put_along_axis(expected, np.argsort(scores, axis=1, kind="stable")[:, :drop], False, axis=1)
    found = keep_highest(torch.from_numpy(scores), drop)
    assert found is not None
    assert found.numpy().tolist() == expected.tolist()
