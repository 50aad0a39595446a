"""Weights into the tile layout and back, and what is refused on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tile_weights import FLOATS, PATHS, bitmask_of, many, quantised, sparse
from torch import Tensor

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.pack import narrow, pack, pack_dense, unpack
from hf_sparse.kernels.cpu.weight import TileWeight


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
    weight = pack(bitmask, values, (n, k), scales)
    same = pack_dense(dense, scales)
    assert torch.equal(weight.masks, same.masks)
    assert torch.equal(weight.values, same.values)
    again, values_again = unpack(weight)
    assert torch.equal(bitmask, again)
    assert torch.equal(values, values_again)
    for path in PATHS:
        decoded = weight.decode(path=path)
        assert torch.equal(weight.decode(path=path, transposed=True), decoded.T)
        assert torch.equal(decoded.float(), dense.float())
    begin, end = weight.masks.shape[0] // 3, weight.masks.shape[0]
    rows = weight.decode(torch.float32, tiles=(begin, end))
    assert torch.equal(rows, dense[begin * 16 :].float())


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
    wide = pack_dense(q, scales, group or k)
    weight = narrow(wide)
    assert weight.values.numel() - 64 == -(-wide.count // 2)
    # Nibble i % 2 of byte i // 2, two's complement.
    values = wide.values[: wide.count].view(torch.int8).tolist()
    stored = weight.values.tolist()
    assert [stored[i // 2] >> 4 * (i % 2) & 15 for i in range(wide.count)] == [
        v % 16 for v in values
    ]
    for got, expected in zip(unpack(weight), unpack(wide), strict=True):
        assert torch.equal(got, expected)
    dense = q.float() * scales.repeat_interleave(group or k, 1)[:, :k]
    for path in PATHS:
        assert torch.equal(weight.decode(path=path), dense)


@pytest.mark.parametrize("value", [8, -9, 127])
def test_values_that_four_bits_do_not_hold_are_not_narrowed(value: int) -> None:
    weight = pack_dense(torch.full((3, 5), value, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="-8 to 7"):
        narrow(weight)
    with pytest.raises(ValueError, match="only int8"):
        narrow(pack_dense(torch.ones(3, 5)))


@pytest.mark.parametrize("path", PATHS)
def test_explicit_zeros_among_the_values_are_kept(path: str) -> None:
    bitmask, values = torch.full((3, 1), 0b111, dtype=torch.uint8), torch.ones(9)
    values[4] = 0
    weight = pack(bitmask, values, (3, 3))
    assert weight.count == 9
    assert torch.equal(weight.decode(path=path), values.reshape(3, 3))
    assert torch.equal(unpack(weight)[1], values)


def tampered(**changes: Tensor) -> None:
    weight = pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    parts = {
        name: changes.get(name, getattr(weight, name))
        for name in ("masks", "tile_base", "block_off", "values")
    }
    TileWeight(weight.shape, weight.dtype, **parts)


def changed(name: str, *at: int, by: int) -> dict[str, Tensor]:
    weight = pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
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
    weight = pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
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
    weight = pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    with pytest.raises(library.NativeError, match="too small"):
        tampered(values=weight.values[:-1].clone())


def test_a_short_buffer_of_int4_values_is_refused() -> None:
    weight, _ = quantised(37, 301, 64, 0.5, torch.Generator().manual_seed(4), library.INT4)
    parts = weight.masks, weight.tile_base, weight.block_off
    with pytest.raises(library.NativeError, match="too small"):
        TileWeight(
            weight.shape, library.INT4, *parts, weight.values[:-1].clone(), weight.scales, 64
        )
    with pytest.raises(ValueError, match="scales"):
        TileWeight(weight.shape, library.INT4, *parts, weight.values)


@pytest.mark.parametrize("name", ["masks", "tile_base", "block_off"])
def test_tensors_of_a_wrong_size_or_dtype_are_refused(name: str) -> None:
    weight = pack_dense(sparse(37, 301, 0.5, torch.Generator().manual_seed(4)))
    tensor = getattr(weight, name)
    with pytest.raises(ValueError, match=name):
        tampered(**{name: tensor[:-1].clone()})
    with pytest.raises(TypeError, match=name):
        tampered(**{name: tensor.double()})


def test_a_file_whose_mask_and_values_disagree_is_refused() -> None:
    bitmask, values = bitmask_of(sparse(9, 21, 0.5, torch.Generator().manual_seed(4)))
    for wrong in (values[:-1].clone(), torch.cat([values, values[:1]])):
        with pytest.raises(library.NativeError, match="number of values differ"):
            pack(bitmask, wrong, (9, 21))
    bitmask[3, 2] |= 0x20  # bit 21 of 21
    with pytest.raises(library.NativeError, match="outside"):
        pack(bitmask, values, (9, 21))
    with pytest.raises(ValueError, match="bitmask has shape"):
        pack(bitmask, values, (9, 25))


def test_wrong_scales_and_groups_are_named() -> None:
    with pytest.raises(ValueError, match="scales"):
        pack_dense(torch.ones(5, 6, dtype=torch.int8))
    with pytest.raises(ValueError, match="group_size 3"):
        pack_dense(torch.ones(5, 6, dtype=torch.int8), torch.ones(5, 2), 3)
    with pytest.raises(ValueError, match="scales has shape"):
        pack_dense(torch.ones(5, 6, dtype=torch.int8), torch.ones(5, 2), 2)
