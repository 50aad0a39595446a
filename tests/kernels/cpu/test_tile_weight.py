"""Packed weights and every path of their products against float64, over random shapes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse.kernels.cpu import library, tile_weight
from hf_sparse.kernels.cpu.decode import decode

PATHS = list(library.paths()) if library.available() else []
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, and what a product of k terms may lose in fp32 on top.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sparse(n: int, k: int, sparsity: float, generator: torch.Generator) -> Tensor:
    dense = torch.randn(n, k, generator=generator)
    return dense * (torch.rand(n, k, generator=generator) >= sparsity)


def bitmask_of(dense: Tensor) -> tuple[Tensor, Tensor]:
    """The file's layout, written the slow and obvious way."""
    n, k = dense.shape
    bits = torch.zeros(n, -(-k // 8) * 8, dtype=torch.uint8)
    bits[:, :k] = dense != 0
    weights = 2 ** torch.arange(8, dtype=torch.int32)
    mask = (bits.reshape(n, -1, 8).int() * weights).sum(-1).to(torch.uint8)
    return mask, dense[dense != 0]


def quantised(
    n: int,
    k: int,
    groups: int | None,
    sparsity: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.int8,
) -> tuple[tile_weight.TileWeight, Tensor]:
    """An int8 or int4 weight and its dense value in float64."""
    top = 7 if dtype == library.INT4 else 127
    q = (torch.randn(n, k, generator=generator) * top / 3).clamp(-top - 1, top).to(torch.int8)
    q[torch.rand(n, k, generator=generator) < sparsity] = 0
    size = groups or k
    scales = torch.rand(n, -(-k // size), generator=generator) * 0.1 + 0.01
    dense = q.double() * scales.double().repeat_interleave(size, 1)[:, :k]
    weight = tile_weight.pack_dense(q, scales, size)
    return tile_weight.narrow(weight) if dtype == library.INT4 else weight, dense


def assert_close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """y within the rounding of its dtype and of an fp32 sum, relative to sum |x| |w|."""
    expected = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        expected = expected + bias.double()
        size = size + bias.double().abs()
    k = x.shape[-1]
    allowed = ROUNDING[y.dtype] * expected.abs() * 1.01 + 2.0**-24 * (k**0.5 + 4) * 2 * size
    if y.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # subnormals
    error = (y.double() - expected).abs()
    assert (error <= allowed + 1e-37).all(), (error - allowed).max()


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
    weight = tile_weight.pack_dense(dense)
    if x.shape[0] and not fits(path, x.shape[0], value_dtype):
        with pytest.raises(library.NativeError, match="path"):
            tile_weight.linear(x, weight, bias, path=path)
        return
    y = tile_weight.linear(x, weight, bias, path=path)
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
    assert_close(tile_weight.linear(x, weight, bias, path=path), x, dense, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 3, 16, 40, 600, 1100])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_large_products_agree_with_float64(path: str, m: int, x_dtype: torch.dtype) -> None:
    if not fits(path, m, torch.bfloat16) or (path == "scalar" and m > 40):
        return  # not this path's, or slow
    g = torch.Generator().manual_seed(m)
    dense = sparse(777, 1333, 0.5, g).bfloat16()
    x = torch.randn(m, 1333, generator=g).to(x_dtype)
    y = tile_weight.linear(x, tile_weight.pack_dense(dense), path=path)
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
    assert_close(tile_weight.linear(x, weight, path=path), x, dense, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value_dtype", [*FLOATS, *library.INTEGERS])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), None])
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
        weight, dense = tile_weight.pack_dense(kept), kept.double()
    x = torch.randn(m, 67, generator=g).to(x_dtype)
    column = 66  # the last of an odd K, where the pair has padding
    if bad is None:  # a NaN whose set bits are all low ones
        if x_dtype != torch.float32:
            return  # fp32's
        x.view(torch.int32)[m // 2, column] = 0x7F800001
    else:
        x[m // 2, column] = bad
    y = tile_weight.linear(x, weight, path=path).double()
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
    weight = tile_weight.pack_dense(kept)
    x = torch.full((m, 67), 2.0).to(x_dtype)
    y = tile_weight.linear(x, weight)[:, 3]
    expected = torch.nn.functional.linear(x.double(), kept.double()).to(x_dtype)[:, 3]
    assert torch.equal(y.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
    if m > 1 and "amx" in PATHS:
        with pytest.raises(library.NativeError, match="cannot run that path"):
            tile_weight.linear(x, weight, path="amx")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 2, 5, 33, 130])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(path: str, m: int, x_dtype: torch.dtype) -> None:
    if not fits(path, m, torch.bfloat16):
        return  # not this path's
    g = torch.Generator().manual_seed(1)
    weight = tile_weight.pack_dense(sparse(523, 711, 0.5, g).bfloat16())
    x = torch.randn(m, 711, generator=g).to(x_dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [tile_weight.linear(x, weight, path=path) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@many
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([*FLOATS, torch.int8]),
    seed=st.integers(0, 2**31),
)
def test_packing_is_undone_by_unpacking_and_decoding(
    n: int, k: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = (sparse(n, k, sparsity, g) * 30).to(dtype)
    bitmask, values = bitmask_of(dense)
    scales = torch.ones(n) if dtype == torch.int8 else None
    weight = tile_weight.pack(bitmask, values, (n, k), scales)
    same = tile_weight.pack_dense(dense, scales)
    assert torch.equal(weight.masks, same.masks)
    assert torch.equal(weight.values, same.values)
    again, values_again = tile_weight.unpack(weight)
    assert torch.equal(bitmask, again)
    assert torch.equal(values, values_again)
    for path in PATHS:
        decoded = decode(weight, path=path)
        assert torch.equal(decode(weight, path=path, transposed=True), decoded.T)
        assert torch.equal(decoded.float(), dense.float())
    begin, end = weight.masks.shape[0] // 3, weight.masks.shape[0]
    panel = decode(weight, torch.float32, tiles=(begin, end))
    assert torch.equal(panel, dense[begin * 16 :].float())


@many
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    group=st.sampled_from([None, 2, 64]),
    seed=st.integers(0, 2**31),
)
def test_int4_takes_half_of_int8_and_holds_the_same(
    n: int, k: int, sparsity: float, group: int | None, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (n, k), generator=g).to(torch.int8)
    q[torch.rand(n, k, generator=g) < sparsity] = 0
    scales = torch.rand(n, -(-k // (group or k)), generator=g).bfloat16().float() + 1
    wide = tile_weight.pack_dense(q, scales, group or k)
    weight = tile_weight.narrow(wide)
    assert weight.values.numel() - 64 == -(-wide.count // 2)
    # Nibble i % 2 of byte i // 2, two's complement.
    values = wide.values[: wide.count].view(torch.int8).tolist()
    stored = weight.values.tolist()
    assert [stored[i // 2] >> 4 * (i % 2) & 15 for i in range(wide.count)] == [
        v % 16 for v in values
    ]
    for got, expected in zip(tile_weight.unpack(weight), tile_weight.unpack(wide), strict=True):
        assert torch.equal(got, expected)
    dense = q.float() * scales.repeat_interleave(group or k, 1)[:, :k]
    for path in PATHS:
        assert torch.equal(decode(weight, path=path), dense)


@pytest.mark.parametrize("value", [8, -9, 127])
def test_values_that_four_bits_do_not_hold_are_not_narrowed(value: int) -> None:
    weight = tile_weight.pack_dense(torch.full((3, 5), value, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="-8 to 7"):
        tile_weight.narrow(weight)
    with pytest.raises(ValueError, match="only int8"):
        tile_weight.narrow(tile_weight.pack_dense(torch.ones(3, 5)))


@pytest.mark.parametrize("path", PATHS)
def test_explicit_zeros_among_the_values_are_kept(path: str) -> None:
    bitmask, values = torch.full((3, 1), 0b111, dtype=torch.uint8), torch.ones(9)
    values[4] = 0
    weight = tile_weight.pack(bitmask, values, (3, 3))
    assert weight.count == 9
    assert torch.equal(decode(weight, path=path), values.reshape(3, 3))
    assert torch.equal(tile_weight.unpack(weight)[1], values)


def test_16_bit_conversions_agree_with_torch_on_every_bit_pattern() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        x = halves.view(dtype).reshape(-1, 1)
        for path in PATHS:
            if path == "amx":
                continue
            y = tile_weight.linear(x, tile_weight.pack_dense(one), path=path)
            assert torch.equal(y.nan_to_num(7), x.nan_to_num(7)), path
            assert torch.equal(y.isnan(), x.isnan()), path


@pytest.mark.parametrize("path", PATHS)
def test_outputs_round_to_nearest_even(path: str) -> None:
    g = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (4096, 1), generator=g).to(torch.int32)
    values = bits.view(torch.float32).nan_to_num(1.0, 2.0, -2.0).squeeze(1)
    values[:64] = torch.rand(64, generator=g) * 2e-7  # fp16's subnormals
    weight = tile_weight.pack_dense(torch.ones(values.numel(), 2))
    for dtype in (torch.bfloat16, torch.float16):
        # The sum is a zero and the bias: the output is the bias, rounded.
        m = 2 if path == "amx" else 1
        if path == "amx":
            weight = tile_weight.pack_dense(torch.ones(values.numel(), 2, dtype=torch.bfloat16))
        y = tile_weight.linear(torch.zeros(m, 2, dtype=dtype), weight, values, path=path)
        assert torch.equal(y[0], values.to(dtype))


def test_x_may_be_any_view() -> None:
    g = torch.Generator().manual_seed(2)
    dense = sparse(20, 30, 0.5, g)
    weight = tile_weight.pack_dense(dense)
    base = torch.randn(8, 90, generator=g)
    views = [base[:, 5:35], base[::2, :30], base[:, ::3], base[:30].T[:30, :0].T, base[0, :30]]
    views += [base[:1, 60:], base[:4, :60].reshape(2, 4, 30), torch.randn(30, 8).T]
    views += [base[:1, :30].expand(5, 30), base[:, 1:2].expand(8, 30), torch.randn(0, 30)]
    for x in views:
        if x.shape[-1] == 30:
            y, expected = tile_weight.linear(x, weight), torch.nn.functional.linear(x, dense)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_a_copied_weight_is_a_weight_of_its_own() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 30)
    int4, _ = quantised(20, 30, 10, 0.5, g, library.INT4)
    for weight in (tile_weight.pack_dense(sparse(20, 30, 0.5, g)), int4):
        expected = tile_weight.linear(x, weight)
        for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
            assert torch.equal(tile_weight.linear(x, other), expected)


def tampered(**changes: Tensor) -> None:
    weight = tile_weight.pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    parts = {
        name: changes.get(name, getattr(weight, name))
        for name in ("masks", "tile_base", "block_off", "values")
    }
    tile_weight.TileWeight(weight.shape, weight.dtype, **parts)


def changed(name: str, *at: int, by: int) -> dict[str, Tensor]:
    weight = tile_weight.pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    tensor = getattr(weight, name).clone()
    tensor[at] += by
    return {name: tensor}


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_changed_tile_base_is_refused(at: int) -> None:
    with pytest.raises(library.NativeError, match="offsets"):
        tampered(**changed("tile_base", at, by=1))


def test_a_changed_block_offset_is_refused() -> None:
    with pytest.raises(library.NativeError, match="offsets"):
        tampered(**changed("block_off", 1, 1, by=-1))


def test_a_changed_mask_is_refused() -> None:
    weight = tile_weight.pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    masks = weight.masks.clone()
    masks[1, 7] ^= 1
    with pytest.raises(library.NativeError, match="offsets"):
        tampered(masks=masks)
    masks = weight.masks.clone()
    masks[0, 150] |= 2  # column 301 of 301
    with pytest.raises(library.NativeError, match="outside"):
        tampered(masks=masks)
    masks = weight.masks.clone()
    masks[2, 3] |= 1 << 12  # row 38 of 37
    with pytest.raises(library.NativeError, match="outside"):
        tampered(masks=masks)


def test_a_short_values_buffer_is_refused() -> None:
    weight = tile_weight.pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    with pytest.raises(library.NativeError, match="too small"):
        tampered(values=weight.values[:-1].clone())


def test_a_short_buffer_of_int4_values_is_refused() -> None:
    weight, _ = quantised(37, 301, 64, 0.5, torch.Generator().manual_seed(4), library.INT4)
    parts = weight.masks, weight.tile_base, weight.block_off
    with pytest.raises(library.NativeError, match="too small"):
        tile_weight.TileWeight(
            weight.shape, library.INT4, *parts, weight.values[:-1].clone(), weight.scales, 64
        )
    with pytest.raises(ValueError, match="scales"):
        tile_weight.TileWeight(weight.shape, library.INT4, *parts, weight.values)


@pytest.mark.parametrize("name", ["masks", "tile_base", "block_off"])
def test_tensors_of_a_wrong_size_or_dtype_are_refused(name: str) -> None:
    weight = tile_weight.pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    tensor = getattr(weight, name)
    with pytest.raises(ValueError, match=name):
        tampered(**{name: tensor[:-1].clone()})
    with pytest.raises(TypeError, match=name):
        tampered(**{name: tensor.double()})


def test_a_file_whose_mask_and_values_disagree_is_refused() -> None:
    bitmask, values = bitmask_of(sparse(9, 21, 0.5, torch.Generator().manual_seed(4)))
    for wrong in (values[:-1].clone(), torch.cat([values, values[:1]])):
        with pytest.raises(library.NativeError, match="number of values differ"):
            tile_weight.pack(bitmask, wrong, (9, 21))
    bitmask[3, 2] |= 0x20  # bit 21 of 21
    with pytest.raises(library.NativeError, match="outside"):
        tile_weight.pack(bitmask, values, (9, 21))
    with pytest.raises(ValueError, match="bitmask has shape"):
        tile_weight.pack(bitmask, values, (9, 25))


def test_wrong_arguments_are_named() -> None:
    weight = tile_weight.pack_dense(torch.ones(5, 6))
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\), expected \(..., 6\)"):
        tile_weight.linear(torch.ones(2, 7), weight)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        tile_weight.linear(torch.ones(2, 6).double(), weight)
    with pytest.raises(ValueError, match="bias has shape"):
        tile_weight.linear(torch.ones(2, 6), weight, torch.ones(6))
    with pytest.raises(ValueError, match="x must be on the CPU, not on meta"):
        tile_weight.linear(torch.ones(2, 6, device="meta"), weight)
    with pytest.raises(ValueError, match="no path 'sse'"):
        tile_weight.linear(torch.ones(2, 6), weight, path="sse")
    with pytest.raises(ValueError, match="scales"):
        tile_weight.pack_dense(torch.ones(5, 6, dtype=torch.int8))
    with pytest.raises(ValueError, match="group_size 3"):
        tile_weight.pack_dense(torch.ones(5, 6, dtype=torch.int8), torch.ones(5, 2), 3)
    with pytest.raises(ValueError, match="scales has shape"):
        tile_weight.pack_dense(torch.ones(5, 6, dtype=torch.int8), torch.ones(5, 2), 2)
