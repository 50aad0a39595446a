"""Products from the packed weight against float64, on every path and over random shapes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import in_one_test
from hypothesis import given
from hypothesis import strategies as st
from tile_weights import FLOATS, PATHS, assert_close, many, quantised, sparse
from torch import Tensor

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.integer.weight import pack as pack_integers
from hf_sparse.kernels.cpu.pack import pack_dense
from hf_sparse.kernels.cpu.product import Product, packed_linear


def fits(path: str, m: int, dtype: torch.dtype, group: int | None = None) -> bool:
    """What the AMX path takes; the others take everything."""
    if path != "amx":
        return True
    if dtype in library.INTEGERS:
        return m >= 6 and (group is None or group % 32 == 0)
    return m >= 2 and dtype == torch.bfloat16


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    m: int
    sparsity: float
    x_dtype: torch.dtype
    with_bias: bool
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def inputs(self, g: torch.Generator) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(self.m, self.k, generator=g).to(self.x_dtype)
        return x, torch.randn(self.n, generator=g) if self.with_bias else None


CASES = st.builds(
    Case,
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    m=st.one_of(st.integers(0, 70), st.integers(1, 6)),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.97, 1.0]),
    x_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value_dtype", FLOATS)
@many
@given(case=CASES)
def test_linear_agrees_with_float64(path: str, value_dtype: torch.dtype, case: Case) -> None:
    g = case.generator()
    dense = sparse(case.n, case.k, case.sparsity, g).to(value_dtype)
    dense[torch.rand(dense.shape[0], generator=g) < 0.1] = 0
    dense[:, torch.rand(dense.shape[1], generator=g) < 0.1] = 0
    x, bias = case.inputs(g)
    weight = pack_dense(dense)
    if x.shape[0] and not fits(path, x.shape[0], value_dtype):
        with pytest.raises(library.NativeError, match="path"):
            packed_linear(x, weight, bias, path=path)
        return
    y = packed_linear(x, weight, bias, path=path)
    assert y.shape == (x.shape[0], dense.shape[0])
    assert y.dtype == x.dtype
    assert_close(y, x, dense, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", library.INTEGERS)
@many
@given(case=CASES, group=st.sampled_from([None, 2, 32, 64, 128, 256]))
def test_codes_agree_with_float64(
    path: str, dtype: torch.dtype, case: Case, group: int | None
) -> None:
    g = case.generator()
    weight, dense = quantised(case.n, case.k, group, case.sparsity, g, dtype)
    x, bias = case.inputs(g)
    grouped = group if group is not None and group < dense.shape[1] else None
    if not fits(path, x.shape[0], dtype, grouped):
        return
    assert_close(packed_linear(x, weight, bias, path=path), x, dense, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 3, 16, 40, 600, 1100])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_large_products_agree_with_float64(path: str, m: int, x_dtype: torch.dtype) -> None:
    if not fits(path, m, torch.bfloat16) or (path == "scalar" and m > 40):
        return  # not this path's, or slow
    g = torch.Generator().manual_seed(m)
    dense = sparse(777, 1333, 0.5, g).bfloat16()
    x = torch.randn(m, 1333, generator=g).to(x_dtype)
    y = packed_linear(x, pack_dense(dense), path=path)
    assert_close(y, x, dense, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", library.INTEGERS)
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("m", [2, 40, 1100])
def test_large_products_of_codes_agree_with_float64(
    path: str, m: int, group: int | None, dtype: torch.dtype
) -> None:
    if not fits(path, m, dtype, group) or (path == "scalar" and m > 40):
        return  # not this path's, or slow
    g = torch.Generator().manual_seed(m)
    weight, dense = quantised(345, 1333, group, 0.5, g, dtype)
    x = torch.randn(m, 1333, generator=g)
    assert_close(packed_linear(x, weight, path=path), x, dense, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value_dtype", [*FLOATS, *library.INTEGERS])
@in_one_test(x_dtype=FLOATS, m=[1, 4, 40], bad=[float("inf"), float("-inf"), float("nan"), None])
def test_non_finite_inputs_come_out_as_of_linear(
    path: str, value_dtype: torch.dtype, x_dtype: torch.dtype, m: int, bad: float | None
) -> None:
    if not fits(path, m, value_dtype):
        return  # not this path's
    g = torch.Generator().manual_seed(5)
    if value_dtype in library.INTEGERS:
        weight, dense = quantised(35, 67, None, 0.5, g, value_dtype)
    else:
        kept = sparse(35, 67, 0.5, g).to(value_dtype)
        weight, dense = pack_dense(kept), kept.double()
    x = torch.randn(m, 67, generator=g).to(x_dtype)
    column = 66  # the last of an odd K, where the pair has padding
    if bad is None:  # a NaN whose set bits are all low ones
        if x_dtype != torch.float32:
            return  # fp32's
        x.view(torch.int32)[m // 2, column] = 0x7F800001
    else:
        x[m // 2, column] = bad
    y = packed_linear(x, weight, path=path).double()
    expected = torch.nn.functional.linear(x.double(), dense)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan"), 2.0**-130])
def test_infinite_and_subnormal_weights_count_as_in_linear(
    x_dtype: torch.dtype, m: int, odd: float
) -> None:
    kept = sparse(35, 67, 0.5, torch.Generator().manual_seed(5)).bfloat16()
    kept[3] = 0
    kept[3, 7] = odd
    weight = pack_dense(kept)
    x = torch.full((m, 67), 2.0).to(x_dtype)
    y = packed_linear(x, weight)[:, 3]
    expected = torch.nn.functional.linear(x.double(), kept.double()).to(x_dtype)[:, 3]
    assert torch.equal(y.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
    if m > 1 and "amx" in PATHS:
        with pytest.raises(library.NativeError, match="cannot run that path"):
            packed_linear(x, weight, path="amx")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 2, 5, 33, 130])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(path: str, m: int, x_dtype: torch.dtype) -> None:
    if not fits(path, m, torch.bfloat16):
        return  # not this path's
    g = torch.Generator().manual_seed(1)
    weight = pack_dense(sparse(523, 711, 0.5, g).bfloat16())
    x = torch.randn(m, 711, generator=g).to(x_dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [packed_linear(x, weight, path=path) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_16_bit_conversions_agree_with_torch_on_every_bit_pattern() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        x = halves.view(dtype).reshape(-1, 1)
        for path in PATHS:
            if path == "amx":
                continue
            y = packed_linear(x, pack_dense(one), path=path)
            assert torch.equal(y.nan_to_num(7), x.nan_to_num(7)), path
            assert torch.equal(y.isnan(), x.isnan()), path


@pytest.mark.parametrize("path", PATHS)
def test_outputs_round_to_nearest_even(path: str) -> None:
    g = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (4096, 1), generator=g).to(torch.int32)
    values = bits.view(torch.float32).nan_to_num(1.0, 2.0, -2.0).squeeze(1)
    values[:64] = torch.rand(64, generator=g) * 2e-7  # fp16's subnormals
    weight = pack_dense(torch.ones(values.numel(), 2))
    for dtype in (torch.bfloat16, torch.float16):
        # The sum is a zero and the bias: the output is the bias, rounded.
        m = 2 if path == "amx" else 1
        if path == "amx":
            weight = pack_dense(torch.ones(values.numel(), 2, dtype=torch.bfloat16))
        y = packed_linear(torch.zeros(m, 2, dtype=dtype), weight, values, path=path)
        assert torch.equal(y[0], values.to(dtype))


def test_x_may_be_any_view() -> None:
    g = torch.Generator().manual_seed(2)
    dense = sparse(20, 30, 0.5, g)
    weight = pack_dense(dense)
    base = torch.randn(8, 90, generator=g)
    views = [base[:, 5:35], base[::2, :30], base[:, ::3], base[:30].T[:30, :0].T, base[0, :30]]
    views += [base[:1, 60:], base[:4, :60].reshape(2, 4, 30), torch.randn(30, 8).T]
    views += [base[:1, :30].expand(5, 30), base[:, 1:2].expand(8, 30), torch.randn(0, 30)]
    for x in views:
        if x.shape[-1] == 30:
            y, expected = packed_linear(x, weight), torch.nn.functional.linear(x, dense)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_a_copied_weight_is_a_weight_of_its_own() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 30)
    int4, _ = quantised(20, 30, 10, 0.5, g, library.INT4)
    for weight in (pack_dense(sparse(20, 30, 0.5, g)), int4):
        expected = packed_linear(x, weight)
        for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
            assert torch.equal(packed_linear(x, other), expected)


def test_wrong_arguments_are_named() -> None:
    weight = pack_dense(torch.ones(5, 6))
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\), expected \(..., 6\)"):
        packed_linear(torch.ones(2, 7), weight)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        packed_linear(torch.ones(2, 6).double(), weight)
    with pytest.raises(ValueError, match="bias has shape"):
        packed_linear(torch.ones(2, 6), weight, torch.ones(6))
    with pytest.raises(ValueError, match="x must be on the CPU, not on meta"):
        packed_linear(torch.ones(2, 6, device="meta"), weight)
    with pytest.raises(ValueError, match="no path 'sse'"):
        packed_linear(torch.ones(2, 6), weight, path="sse")


@pytest.mark.parametrize("layout", ["tile", "integer"])
def test_a_prepared_product_of_one_token_is_that_of_what_it_is_given(layout):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (40, 36), dtype=torch.int8)
    codes[torch.rand(40, 36) < 0.5] = 0
    scales = torch.full((40, 1), 2.0**-7)
    weight = (pack_integers if layout == "integer" else pack_dense)(codes, scales, 36)
    dense, product, bias = codes * scales, Product(weight), torch.randn(40)
    close = {"rtol": 0.01, "atol": 0.1 if layout == "integer" else 0.02}
    wide = torch.randn(2, 36, 2)
    inputs = [
        (torch.randn(1, 36), None),
        (torch.randn(1, 1, 36), None),
        (torch.randn(36), None),
        (torch.randn(1, 36).bfloat16(), None),
        (wide[:1, :, 1], None),
        (torch.randn(1, 36, dtype=torch.complex64).conj().imag, None),  # negated when it is read
        (torch.randn(1, 36), bias),
        (torch.randn(1, 36), bias.bfloat16()),
        (torch.randn(1, 36), torch.randn(40, dtype=torch.complex64).conj().imag.contiguous()),
        (torch.randn(3, 36), bias),
    ]
    for x, own in inputs * 2:  # what is prepared for one is not taken for another
        for _ in range(3):
            expected = F.linear(x.float(), dense, None if own is None else own.float())
            found = product(x, own)
            assert found.dtype == x.dtype
            torch.testing.assert_close(found.float(), expected, **close)
    bias += 1
    x = torch.randn(1, 36)
    torch.testing.assert_close(product(x, bias), F.linear(x, dense, bias), **close)
    with pytest.raises(ValueError, match="expected"):
        product(x, bias[:20])
    with pytest.raises(ValueError, match="expected"):
        product(torch.randn(36, 1))
    with torch.inference_mode():
        product(x)
        assert product(x).is_inference()
    assert not product(x).is_inference()
    torch.testing.assert_close(copy.deepcopy(product)(x), F.linear(x, dense), **close)


def test_prepared_products_do_not_share_their_results():
    dense = torch.randn(40, 36)
    product, x = Product(pack_dense(dense)), torch.randn(1, 36)
    first, second = product(x), product(x)
    third = product(-x)
    assert torch.equal(first, second)
    assert torch.equal(third, -first)
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
