"""Products of the sliced layout: under Triton's interpreter, or compiled where a GPU is."""

import dataclasses

import pytest
import torch
from sliced_weights import DEVICE, coded, pruned, scaled

from hf_sparse.kernels.gpu import pack, product, unpack
from hf_sparse.kernels.gpu import weight as gpu_weight
from hf_sparse.kernels.gpu.check import check

pytest.importorskip("triton")
from hf_sparse.kernels.gpu import triton_decode, triton_product


@pytest.mark.parametrize(
    ("columns", "kept", "sparsity", "dtype"),
    [
        (1024, 1024, 0.5, torch.int8),
        (4096, 2048, 0.0, torch.int16),
        (300_000, 140_000, 0.0, torch.int32),
    ],
)
def test_anchors_take_the_least_bits_that_hold_them(columns, kept, sparsity, dtype):
    weight = torch.zeros(5, columns, device=DEVICE)
    weight[:, :kept] = pruned(5, kept, sparsity)
    packed = pack.pack_dense(weight)
    assert packed.anchors.dtype == dtype
    check(packed)
    assert torch.equal(unpack.codes(packed), weight)
    if columns > 1024:
        return  # the interpreter would take minutes
    x = torch.randn(1, columns, device=DEVICE)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(
        triton_product.product(x, packed).double(), expected, rtol=1e-5, atol=1e-3
    )
    dense = triton_decode.decode_window(packed, 0, 5, torch.empty_like(weight))
    assert torch.equal(dense, weight)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(5, 7, 1), (33, 40, 3), (40, 300, 1)])
def test_products_agree_with_double_precision(rows, columns, tokens, sparsity):
    weight = pruned(rows, columns, sparsity)
    x = torch.randn(tokens, columns, device=DEVICE)
    y = triton_product.product(x, pack.pack_dense(weight))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_in_fp32(dtype):
    weight, x = pruned(20, 100, 0.5, dtype), torch.randn(9, 100, device=DEVICE).to(dtype)
    y = triton_product.product(x, pack.pack_dense(weight))
    expected = x.double() @ weight.double().T
    # A unit in the last place for the one rounding, of the result: the interpreter truncates.
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 100])
def test_products_of_codes_apply_the_scale_of_each_group(bits, group):
    codes, scales = coded(35, 100, bits, group)
    x = torch.randn(2, 100, device=DEVICE)
    packed = pack.pack_dense(codes, scales, group)
    weight = scaled(codes, scales, group)
    y = triton_product.product(x, packed)
    rounding = 1e-6 * float((x.double().abs() @ weight.abs().T).max())
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=0, atol=rounding)


def test_columns_that_pad_a_row_read_no_scale_behind_the_last():
    codes, scales = coded(33, 34, 8, 7)
    packed = pack.pack_dense(codes.clamp(min=1), scales, 7)  # no zero, so that all are listed
    assert scales.shape[1] * 7 < packed.padded
    memory = torch.full((2 * packed.scales.numel(),), float("nan"), device=DEVICE)
    own = memory[: packed.scales.numel()].view_as(packed.scales).copy_(packed.scales)
    y = triton_product.product(
        torch.ones(1, 34, device=DEVICE), dataclasses.replace(packed, scales=own)
    )
    expected = scaled(codes.clamp(min=1), scales, 7).sum(dim=1)
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_split_between_programs_adds_up(monkeypatch):
    monkeypatch.setattr(pack, "SHORTEST_SEGMENT", 1)
    weight = pruned(2, 1200, 0.3, torch.bfloat16)
    packed = pack.pack_dense(weight)
    assert packed.splits > 1
    x = torch.randn(1, 1200, device=DEVICE).bfloat16()
    assert torch.equal(
        triton_product.product(x, packed), (x.double() @ weight.double().T).bfloat16()
    )


def test_widths_of_gaps_all_multiply_alike(monkeypatch):
    weight, x = pruned(33, 90, 0.6), torch.randn(1, 90, device=DEVICE)
    expected = x.double() @ weight.double().T
    for width in gpu_weight.WIDTHS:
        monkeypatch.setattr(pack, "_best_width", lambda *_, width=width: width)
        packed = pack.pack_dense(weight)
        assert packed.width == width
        y = triton_product.product(x, packed)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["floats", "int8", "int4", "int4, a scale a row"])
def test_windows_are_decoded_into_the_room_that_is_given(monkeypatch, kind):
    monkeypatch.setattr(pack, "WINDOW_WEIGHTS", 32 * 56)
    rows, columns = 70, 50
    if kind == "floats":
        expected = pruned(rows, columns, 0.5).double()
        packed = pack.pack_dense(expected.float())
    else:
        group = columns if "row" in kind else 16
        codes, scales = coded(rows, columns, 8 if kind == "int8" else 4, group)
        packed, expected = pack.pack_dense(codes, scales, group), scaled(codes, scales, group)
    room = torch.full((packed.window, columns), float("nan"), device=DEVICE)
    assert triton_decode.windows(packed) == [(0, 32), (32, 64), (64, 70)]
    for first, last in triton_decode.windows(packed):
        found = triton_decode.decode_window(packed, first, last, room)
        torch.testing.assert_close(found.double(), expected[first:last], rtol=1e-6, atol=0)


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    launched, guarded = [], []

    class DeviceOf:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            guarded.append(self.tensor)

        def __exit__(self, *_):
            guarded.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(guarded[-1].shape)

    from hf_sparse.solvers import sparsegpt_triton

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    for module, name in (
        (triton_product, "_product"),
        (triton_decode, "_decode_window"),
        (sparsegpt_triton, "_solve_block"),
    ):
        monkeypatch.setattr(module, name, Kernel())
    packed = pack.pack_dense(pruned(40, 44, 0.5))
    triton_product.product(torch.randn(3, 44, device=DEVICE), packed)
    triton_decode.decode_window(packed, 0, 40, torch.empty(64, 44, device=DEVICE))
    kept = torch.ones(4, 8, dtype=torch.bool)
    sparsegpt_triton.solve_block(
        torch.randn(4, 8), kept, torch.eye(4), torch.zeros(4).bool(), 0, 0, 0
    )
    assert launched == [(3, 44), (64, 44), (4, 8)]


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_every_way_gives_the_product(monkeypatch, tokens):
    monkeypatch.setattr(pack, "WINDOW_WEIGHTS", 32 * 48)
    weight, x = pruned(40, 44, 0.5), torch.randn(tokens, 44, device=DEVICE)
    packed = pack.pack_dense(weight)
    for way in product.WAYS.values():
        torch.testing.assert_close(way(x, packed), x @ weight.T, rtol=1e-5, atol=1e-5)
    grad = torch.randn(tokens, 40, device=DEVICE)
    found = product._decoded_transposed(grad, packed)
    torch.testing.assert_close(found, grad @ weight, rtol=1e-5, atol=1e-5)
