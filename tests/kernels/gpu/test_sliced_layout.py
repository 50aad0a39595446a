"""The sliced layout: what packing keeps, and what the check refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sliced_weights import coded, pruned, scaled

from hf_sparse.core.patterns import Unstructured
from hf_sparse.kernels.gpu import pack, unpack
from hf_sparse.kernels.gpu import weight as gpu_weight
from hf_sparse.kernels.gpu.check import check

SHAPES = [(1, 1), (5, 7), (33, 36), (64, 40), (40, 300), (3, 700)]


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_packed_weight_is_valid_and_unpacks_to_itself(rows, columns, sparsity, dtype):
    weight = pruned(rows, columns, sparsity, dtype)
    packed = pack.pack_dense(weight)
    check(packed)
    assert torch.equal(unpack.codes(packed), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_come_back(shape, bits):
    codes, scales = coded(*shape, bits, 16)
    packed = pack.pack_dense(codes, scales, 16)
    check(packed)
    assert packed.dtype == (torch.int8 if codes.abs().max() > 8 else gpu_weight.INT4)
    assert torch.equal(unpack.codes(packed), codes)
    assert torch.equal(unpack.row_scales(packed), scales)
    expected = scaled(codes, scales, 16)
    torch.testing.assert_close(unpack.dense(packed, torch.float64), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("sparsity", "limit"), [(0.5, 0.604), (0.6, 0.491), (0.7, 0.381), (0.8, 0.264), (0.9, 0.159)]
)
def test_bytes_are_near_those_of_the_kept_values(sparsity, limit):
    # Rows of one length, as many a method makes them, and as rows of a large matrix nearly have.
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(64, 4096, generator=generator).argsort(dim=1)
    weight = torch.randn(64, 4096, generator=generator).bfloat16() * (order >= sparsity * 4096)
    assert pack.pack_dense(weight).nbytes <= limit * weight.nbytes


def test_uneven_rows_share_slices_with_rows_of_their_length():
    weight = pruned(64, 400, 0.9)
    weight[::2] = pruned(32, 400, 0.2)
    packed = pack.pack_dense(weight)
    groups = packed.slices[1:, 0] - packed.slices[:-1, 0]
    assert groups[0] >= 4 * groups[1]
    assert torch.equal(unpack.codes(packed), weight)


def test_windows_keep_their_rows_together(monkeypatch):
    monkeypatch.setattr(pack, "WINDOW_WEIGHTS", 32 * 40)
    weight = pruned(70, 40, 0.5)
    packed = pack.pack_dense(weight)
    assert packed.window == 32
    check(packed)
    assert torch.equal(unpack.codes(packed), weight)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("order", lambda t: t.fill_(0)),
        ("order", lambda t: t.fill_(-1)),
        ("slices", lambda t: t[-1].add_(1)),
        ("slices", lambda t: t[0].sub_(1)),
        ("slices", lambda t: t[1:, 1].add_(1)),
        ("anchors", lambda t: t.fill_(-3)),
        ("anchors", lambda t: t.fill_(39)),
        ("gaps", lambda t: t.fill_(-1)),
    ],
)
def test_tensors_that_lead_out_of_bounds_are_refused(name, change):
    packed = pack.pack_dense(pruned(40, 40, 0.5)).copy()
    change(getattr(packed, name))
    with pytest.raises(ValueError, match=name):
        check(packed)


@pytest.mark.parametrize("number", ["segment_units", "splits"])
def test_segments_beyond_what_kernels_count_are_refused(number):
    packed = dataclasses.replace(pack.pack_dense(pruned(40, 40, 0.5)), **{number: 1 << 30})
    with pytest.raises(ValueError, match="segments"):
        check(packed)


@pytest.mark.parametrize("name", ["values", "gaps", "anchors", "slices", "order"])
def test_tensors_of_another_size_are_refused(name):
    packed = pack.pack_dense(pruned(40, 40, 0.5))
    with pytest.raises(ValueError, match=f"{name}|slices"):
        check(dataclasses.replace(packed, **{name: getattr(packed, name)[:-1]}))


def test_unstructured_and_uniform_rows_are_both_counted_exactly():
    weight = pruned(64, 100, 0)
    weight = weight * Unstructured(0.6).mask(weight.abs())
    packed = pack.pack_dense(weight)
    assert int(torch.count_nonzero(packed.values)) == 2560
