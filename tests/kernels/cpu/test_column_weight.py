"""Weights held by column: what they hold, and products that skip inputs of 0."""

import copy
import pickle

import pytest
import torch

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.columns.weight import ColumnWeight, hold_by_column
from hf_sparse.kernels.cpu.product import decoded_linear, packed_linear

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (35, 17), (1030, 9), (2100, 5)]
PATHS = list(library.paths()) if library.available() else []


def make_weight(rows: int, columns: int, kept: float, dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=random)
    return (weight * (torch.rand(rows, columns, generator=random) < kept)).to(dtype)


def make_inputs(tokens: int, columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=random)
    return x * (torch.rand(tokens, columns, generator=random) < 0.6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [0.4, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_weight_is_the_same_after_it_was_held_by_column(shape, kept, dtype):
    weight = make_weight(*shape, kept, dtype)
    held = hold_by_column(weight)
    assert (held.panels is None) == (int((weight != 0).sum()) > 0.85 * weight.numel())
    for copied in (held, copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert torch.equal(copied.dense(dtype), weight)
        assert torch.equal(copied.dense(torch.float64), weight.double())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [0.4, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_agree_with_float64(path, shape, kept, dtype):
    weight = make_weight(*shape, kept, dtype)
    x, bias = make_inputs(3, shape[1]), torch.randn(shape[0])
    held = hold_by_column(weight)
    expected = x.double() @ weight.double().T + bias.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(packed_linear(x, held, bias, path).double(), expected, **tolerance)
    torch.testing.assert_close(decoded_linear(x, held, bias).double(), expected, **tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kept", [0.4, 1.0])
def test_columns_whose_input_is_0_are_not_read_and_others_are(path, kept):
    weight = make_weight(40, 12, 1.0, torch.float32)
    weight[:, 3::4] *= make_weight(40, 3, kept, torch.float32) != 0
    weight[:, ::2] *= kept < 1.0  # zeros enough to be packed
    x = make_inputs(1, 12)
    x[0, 5], x[0, 7] = 0.0, float("nan")
    marked = weight.clone()
    marked[:, 5] = float("inf")  # times 0 would be NaN
    x_finite = x.nan_to_num(1.0)
    held = hold_by_column(marked)
    assert packed_linear(x_finite, held, path=path).isfinite().all()
    assert packed_linear(x, held, path=path).isnan().all()


@pytest.mark.parametrize("kept", [0.4, 1.0])
def test_the_result_does_not_depend_on_the_number_of_threads(kept):
    weight, x = make_weight(4096, 512, kept, torch.bfloat16), make_inputs(1, 512)
    held, threads = hold_by_column(weight), torch.get_num_threads()
    alone = packed_linear(x, held)
    try:
        torch.set_num_threads(3)
        assert torch.equal(packed_linear(x, held), alone)
    finally:
        torch.set_num_threads(threads)


def test_panels_that_do_not_suit_the_shape_are_an_error():
    held = hold_by_column(make_weight(64, 33, 0.4, torch.float32))
    assert held.panels is not None
    with pytest.raises(library.NativeError, match="panels"):
        ColumnWeight((64, 32), None, held.panels, held.panel_rows)
    with pytest.raises(ValueError, match="panels of 48 rows"):
        ColumnWeight((64, 33), None, held.panels, 48)
