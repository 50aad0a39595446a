"""Operators and the native library with arguments that nothing promises anything about."""

import ctypes

import hostile_calls
import pytest
import torch

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.dense_row import product
from hf_sparse.kernels.cpu.kernel import TileKernel
from hf_sparse.kernels.cpu.pack import pack_dense
from hf_sparse.kernels.cpu.product import decoded_linear, packed_linear
from hf_sparse.kernels.cpu.weight import TileWeight


@pytest.mark.filterwarnings("ignore")  # torch's, of views of tensors in other layouts
def test_hostile_calls_are_right_or_refused_with_a_reason():
    outcomes = hostile_calls.run(250)
    assert outcomes.total() == 250
    for kind in ("right", "refused, ValueError", "refused, TypeError"):
        assert any(outcome.endswith(kind) for outcome in outcomes), kind


def coded(rows=400, columns=2):
    codes = torch.randint(-5, 6, (rows, columns), dtype=torch.int8)
    return codes, torch.arange(1, rows + 1).float()


@pytest.mark.parametrize("size", [2, 3, 4, 1 << 31, 1 << 62, (1 << 63) - 2, (1 << 63) - 1])
def test_a_group_may_be_larger_than_any_row(size):
    codes, scales = coded()
    weight, x = pack_dense(codes, scales), torch.ones(1, 2)
    tensors = (weight.masks, weight.tile_base, weight.block_off, weight.values, weight.scales)
    found = TileKernel.operators[0](x, *(tensor.clone() for tensor in tensors), 400, 2, 3, size)
    torch.testing.assert_close(found[0], codes.float().sum(dim=1) * scales)


@pytest.mark.parametrize("path", library.paths())
@pytest.mark.parametrize("size", [(1 << 63) - 1, (1 << 64) + 2, 1 << 100])
def test_a_group_size_that_no_64_bits_hold_is_one_scale_a_row(size, path):
    codes, scales = coded(columns=4)
    wide = pack_dense(codes, scales)
    weight = TileWeight((400, 4), wide.dtype, wide.masks, wide.tile_base, wide.block_off,
                        wide.values, wide.scales, size)  # fmt: skip
    x = torch.ones(6, 4)
    expected = (codes.float().sum(dim=1) * scales).expand(6, -1)
    torch.testing.assert_close(packed_linear(x, weight, path=path), expected)


@pytest.mark.parametrize("size", [0, -1, -(1 << 63), 3])
def test_a_group_size_that_makes_no_sense_is_refused(size):
    codes, scales = coded(columns=4)
    wide = pack_dense(codes, scales)
    tensors = wide.masks, wide.tile_base, wide.block_off, wide.values, wide.scales
    with pytest.raises(ValueError, match=f"group_size {size} must be positive, and even"):
        TileWeight((400, 4), wide.dtype, *tensors, size)


def negated(*shape):
    """A view that stands for the negative of what is in memory."""
    view = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("multiply", [packed_linear, decoded_linear])
def test_lazily_negated_inputs_weights_and_biases_keep_their_signs(multiply):
    dense, x, bias = negated(20, 7), negated(3, 7), negated(20)
    found = multiply(x, pack_dense(dense), bias)
    expected = torch.nn.functional.linear(x.clone(), dense.clone(), bias.clone())
    torch.testing.assert_close(found, expected)


def test_a_lazily_negated_row_and_scales_keep_their_signs():
    head, row = torch.randn(5, 7).bfloat16(), torch._neg_view(torch.randn(1, 7).bfloat16())
    assert torch.equal(product(row, head), product(row.clone(), head))
    assert torch.equal(
        product(row, torch._neg_view(head)), product(row, torch._neg_view(head).clone())
    )
    codes, scales = coded()
    weight = pack_dense(codes, torch._neg_view(scales))
    expected = -codes.float().sum(dim=1) * scales
    torch.testing.assert_close(packed_linear(torch.ones(1, 2), weight)[0], expected)


NOWHERE = [-(1 << 63), -1, 0, 35, (1 << 33) + 1, 1 << 61, (1 << 63) - 1]


@pytest.mark.parametrize("stride", NOWHERE)
def test_the_library_itself_refuses_strides_that_no_array_has(stride):
    weight, x, y = pack_dense(torch.randn(20, 36)), torch.randn(3, 36), torch.zeros(3, 20)
    lib, out = library.library(), torch.zeros(20, 36)
    args = weight.address, -1, x.data_ptr(), 0, 3
    pool = ctypes.c_void_p()
    assert lib.tile_linear(*args, stride, None, 0, y.data_ptr(), 0, 20, pool) == 1
    if stride != 35:
        assert lib.tile_linear(*args, 36, None, 0, y.data_ptr(), 0, stride, pool) == 1
    decode = weight.address, -1, 0, 2, out.data_ptr(), 0, stride
    assert lib.tile_decode(*decode, 0, pool) == 1
    dense = torch.randn(20, 36).bfloat16()
    assert lib.tile_dense_row(20, 36, dense.data_ptr(), 1, stride, -1, x.data_ptr(), 0,
                              y.data_ptr(), 0, pool) == 1  # fmt: skip
    assert lib.tile_count_dense(20, 36, dense.data_ptr(), stride, 1) == -1
    assert not y.any()
    assert not out.any()


def test_the_library_itself_refuses_arrays_that_are_not_there():
    weight, x, y = pack_dense(torch.randn(20, 36)), torch.randn(3, 36), torch.zeros(3, 20)
    lib, pool = library.library(), ctypes.c_void_p()
    code = lib.tile_linear(weight.address, -1, None, 0, 3, 36, None, 0, y.data_ptr(), 0, 20, pool)
    assert lib.tile_message(code) == b"an array is missing"
    assert (
        lib.tile_linear(weight.address, -1, x.data_ptr(), 0, 3, 36, None, 0, None, 0, 20, pool)
        == code
    )
    assert lib.tile_unpack(weight.address, None, None, pool) == code
    assert lib.tile_count_dense(20, 36, None, 36, 0) == -1
