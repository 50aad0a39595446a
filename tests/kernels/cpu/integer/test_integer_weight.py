"""Codes into the integer layout and back, and what is refused on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tile_weights import many
from torch import Tensor

from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.integer.weight import ALL, ANY, IntegerWeight, pack

KINDS = ["none", "unstructured", "2:4", "4:8", "1:8", "all"]


def codes_of(kind: str, n: int, k: int, top: int, seed: int) -> Tensor:
    """Codes in -top - 1 .. top, none of them 0 where they are kept."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, top + 1, (n, k), generator=g)
    codes *= 1 - 2 * torch.randint(0, 2, (n, k), generator=g)
    codes[torch.rand(n, k, generator=g) < 0.02] = -top - 1
    if kind == "none":
        codes.zero_()
    elif kind == "unstructured":
        codes *= torch.rand(n, k, generator=g) < 0.5
        codes[: n // 3] = 0
    elif ":" in kind:
        kept, of = map(int, kind.split(":"))
        order = torch.rand(n, -(-k // of), of, generator=g).argsort(dim=2)
        codes *= (order < kept).flatten(1)[:, :k]
    return codes.to(torch.int8)


def scales_of(n: int, k: int, group: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    return (torch.rand(n, -(-k // group), generator=g) + 0.1).bfloat16().float()


@many
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    top=st.sampled_from([7, 127]),
    group=st.sampled_from([8, 24, 128, 1 << 62]),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_come_back(
    n: int, k: int, kind: str, top: int, group: int, seed: int
) -> None:
    codes, scales = codes_of(kind, n, k, top, seed), scales_of(n, k, group)
    weight = pack(codes, scales, group)
    assert torch.equal(weight.codes(), codes)
    assert torch.equal(weight.rows_scales.float(), scales)
    dense = codes * scales.repeat_interleave(min(group, k), dim=1)[:, :k]
    assert torch.equal(weight.dense(torch.float32), dense)
    assert weight.bits == (4 if int(codes.max()) <= 7 and int(codes.min()) >= -8 else 8)


@pytest.mark.parametrize(
    ("kind", "top", "kept", "bytes_a_weight"),
    [
        ("unstructured", 127, ANY, 0.46),  # a third of the rows is empty
        ("unstructured", 7, ANY, 0.32),
        ("2:4", 127, 4, 0.625),
        ("2:4", 7, 4, 0.375),
        ("4:8", 7, 4, 0.375),
        ("1:8", 7, 1, 0.1875),
        ("all", 127, ALL, 1.0),
        ("all", 7, ALL, 0.5),
    ],
)
def test_a_weight_is_held_in_what_takes_least(kind, top, kept, bytes_a_weight):
    codes = codes_of(kind, 96, 1024, top, 0)
    weight = pack(codes, scales_of(96, 1024, 1024), 1024)
    assert weight.kept == kept
    assert weight.nbytes / codes.numel() == pytest.approx(bytes_a_weight, abs=0.02)


def test_a_fixed_count_makes_up_with_zeros_for_codes_that_are_missing():
    codes = codes_of("4:8", 16, 64, 7, 0)
    codes[0, :8] = 0
    weight = pack(codes, scales_of(16, 64, 64), 64)
    assert weight.kept == 4
    assert torch.equal(weight.codes(), codes)


def test_a_count_that_does_not_hold_is_refused():
    codes = codes_of("all", 9, 20, 7, 0)
    with pytest.raises(library.NativeError, match="bits and the number of values differ"):
        pack(codes, scales_of(9, 20, 20), 20, kept=7)


def packed() -> IntegerWeight:
    return pack(codes_of("unstructured", 33, 36, 7, 0), scales_of(33, 36, 8), 8)


def flipped(tensor: Tensor, at: int, bits: int) -> Tensor:
    other = tensor.clone()
    other.view(-1)[at] ^= bits
    return other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"masks": flipped(w.masks, 9, 255)}, "offsets contradict"),
        (lambda w: {"masks": flipped(w.masks, -1, 1)}, "outside the weight's shape"),
        (lambda w: {"masks": flipped(w.masks, 33, 16)}, "outside the weight's shape"),
        (lambda w: {"tile_base": flipped(w.tile_base, 2, 8)}, "offsets contradict"),
        (lambda w: {"values": w.values[:-1]}, "too small"),
        (lambda w: {"values": w.values[:3]}, "too small"),
        (lambda w: {"kept": 3}, "bits and the number of values differ"),
        (lambda w: {"kept": 9}, "kept of 0 to 8"),
        (lambda w: {"bits": 3}, "bits of 8 or 4"),
        (lambda w: {"group_size": 12}, "multiple of 8"),
        (lambda w: {"group_size": 0}, "must be positive"),
        (lambda w: {"group_size": 16}, "scales has shape"),
        (lambda w: {"scales": w.scales.float()}, "expected torch.bfloat16"),
        (lambda w: {"shape": (0, 36)}, "must be between 1 and"),
    ],
)
def test_a_weight_whose_parts_contradict_each_other_is_refused(change, words):
    weight = packed()
    with pytest.raises((ValueError, TypeError, library.NativeError), match=words):
        replace(weight, **change(weight))
