"""The sliced layout and its products: under Triton's interpreter, or compiled where a GPU is."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.core.grids import Grid
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.formats import Bitmask, Quantized
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import Stored
from hf_sparse.kernels.gpu import kernel as gpu_kernel
from hf_sparse.kernels.gpu import packer
from hf_sparse.kernels.gpu import weight as gpu_weight
from hf_sparse.kernels.gpu.kernel import SlicedKernel, sliced_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (5, 7), (33, 36), (64, 40), (40, 300), (3, 700)]


def pruned(rows, columns, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    return (weight * kept).to(DEVICE, dtype)


def coded(rows, columns, bits, group):
    """Codes, and scales of groups of columns."""
    limit = 2 ** (bits - 1) - 1
    codes = (pruned(rows, columns, 0.5) * limit / 3).round().clamp(-limit, limit).to(torch.int8)
    return codes, torch.rand(rows, -(-columns // group), device=DEVICE) + 0.1


def scaled(codes, scales, group):
    """The weight of codes, in double precision."""
    columns = torch.arange(codes.shape[1], device=codes.device) // group
    return codes.double() * scales.double()[:, columns]


def kernel_of(weight, fmt=None):
    fmt = fmt or Bitmask()
    return SlicedKernel.of(Stored(fmt, fmt.pack(weight), tuple(weight.shape), weight.dtype))


# --- layout ---------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_packed_weight_is_valid_and_unpacks_to_itself(rows, columns, sparsity, dtype):
    weight = pruned(rows, columns, sparsity, dtype)
    packed = packer.sliced(weight)
    packed.check()
    assert torch.equal(packed.codes(), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_come_back(shape, bits):
    codes, scales = coded(*shape, bits, 16)
    packed = packer.sliced(codes, scales, 16)
    packed.check()
    assert packed.dtype == (torch.int8 if codes.abs().max() > 8 else gpu_weight.INT4)
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.row_scales(), scales)
    expected = scaled(codes, scales, 16)
    torch.testing.assert_close(packed.dense(torch.float64), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("sparsity", "limit"), [(0.5, 0.604), (0.6, 0.491), (0.7, 0.381), (0.8, 0.264), (0.9, 0.159)]
)
def test_bytes_are_near_those_of_the_kept_values(sparsity, limit):
    # Rows of one length, as many a method makes them, and as rows of a large matrix nearly have.
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(64, 4096, generator=generator).argsort(dim=1)
    weight = torch.randn(64, 4096, generator=generator).bfloat16() * (order >= sparsity * 4096)
    assert packer.sliced(weight).nbytes <= limit * weight.nbytes


def test_uneven_rows_share_slices_with_rows_of_their_length():
    weight = pruned(64, 400, 0.9)
    weight[::2] = pruned(32, 400, 0.2)
    packed = packer.sliced(weight)
    groups = packed.slices[1:, 0] - packed.slices[:-1, 0]
    assert groups[0] >= 4 * groups[1]
    assert torch.equal(packed.codes(), weight)


@pytest.mark.parametrize(
    ("columns", "kept", "sparsity", "dtype"),
    [
        (4096, 4096, 0.5, torch.int8),
        (4096, 2048, 0.0, torch.int16),
        (300_000, 140_000, 0.0, torch.int32),
    ],
)
def test_anchors_take_the_least_bits_that_hold_them(triton_product, columns, kept, sparsity, dtype):
    weight = torch.zeros(5, columns, device=DEVICE)
    weight[:, :kept] = pruned(5, kept, sparsity)
    packed = packer.sliced(weight)
    assert packed.anchors.dtype == dtype
    packed.check()
    assert torch.equal(packed.codes(), weight)
    if columns > 4096:
        return  # the interpreter would take minutes
    x = torch.randn(1, columns, device=DEVICE)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(
        triton_product.product(x, packed).double(), expected, rtol=1e-5, atol=1e-3
    )
    dense = triton_product.panel(packed, 0, 5, torch.empty_like(weight))
    assert torch.equal(dense, weight)


def test_windows_keep_their_rows_together(monkeypatch):
    monkeypatch.setattr(packer, "WINDOW_WEIGHTS", 32 * 40)
    weight = pruned(70, 40, 0.5)
    packed = packer.sliced(weight)
    assert packed.window == 32
    packed.check()
    assert torch.equal(packed.codes(), weight)


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
    packed = packer.sliced(pruned(40, 40, 0.5)).copy()
    change(getattr(packed, name))
    with pytest.raises(ValueError, match=name):
        packed.check()


@pytest.mark.parametrize("number", ["segment_units", "splits"])
def test_segments_beyond_what_kernels_count_are_refused(number):
    packed = dataclasses.replace(packer.sliced(pruned(40, 40, 0.5)), **{number: 1 << 30})
    with pytest.raises(ValueError, match="segments"):
        packed.check()


@pytest.mark.parametrize("name", ["values", "gaps", "anchors", "slices", "order"])
def test_tensors_of_another_size_are_refused(name):
    packed = packer.sliced(pruned(40, 40, 0.5))
    with pytest.raises(ValueError, match=f"{name}|slices"):
        dataclasses.replace(packed, **{name: getattr(packed, name)[:-1]}).check()


# --- products -------------------------------------------------------------------------------


@pytest.fixture
def triton_product():
    pytest.importorskip("triton")
    from hf_sparse.kernels.gpu import triton_product

    return triton_product


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(5, 7, 1), (33, 40, 3), (40, 300, 1)])
def test_products_agree_with_double_precision(triton_product, rows, columns, tokens, sparsity):
    weight = pruned(rows, columns, sparsity)
    x = torch.randn(tokens, columns, device=DEVICE)
    y = triton_product.product(x, packer.sliced(weight))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_in_fp32(triton_product, dtype):
    weight, x = pruned(20, 100, 0.5, dtype), torch.randn(9, 100, device=DEVICE).to(dtype)
    y = triton_product.product(x, packer.sliced(weight))
    expected = x.double() @ weight.double().T
    # A unit in the last place for the one rounding, of the result: the interpreter truncates.
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 100])
def test_products_of_codes_apply_the_scale_of_each_group(triton_product, bits, group):
    codes, scales = coded(35, 100, bits, group)
    x = torch.randn(2, 100, device=DEVICE)
    packed = packer.sliced(codes, scales, group)
    weight = scaled(codes, scales, group)
    y = triton_product.product(x, packed)
    rounding = 1e-6 * float((x.double().abs() @ weight.abs().T).max())
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=0, atol=rounding)


def test_columns_that_pad_a_row_read_no_scale_behind_the_last(triton_product):
    codes, scales = coded(33, 34, 8, 7)
    packed = packer.sliced(codes.clamp(min=1), scales, 7)  # no zero, so that all are listed
    assert scales.shape[1] * 7 < packed.padded
    memory = torch.full((2 * packed.scales.numel(),), float("nan"), device=DEVICE)
    own = memory[: packed.scales.numel()].view_as(packed.scales).copy_(packed.scales)
    y = triton_product.product(
        torch.ones(1, 34, device=DEVICE), dataclasses.replace(packed, scales=own)
    )
    expected = scaled(codes.clamp(min=1), scales, 7).sum(dim=1)
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_split_between_programs_adds_up(triton_product, monkeypatch):
    monkeypatch.setattr(packer, "SHORTEST_SEGMENT", 1)
    weight = pruned(2, 1200, 0.3, torch.bfloat16)
    packed = packer.sliced(weight)
    assert packed.splits > 1
    x = torch.randn(1, 1200, device=DEVICE).bfloat16()
    assert torch.equal(
        triton_product.product(x, packed), (x.double() @ weight.double().T).bfloat16()
    )


def test_widths_of_gaps_all_multiply_alike(triton_product, monkeypatch):
    weight, x = pruned(33, 90, 0.6), torch.randn(1, 90, device=DEVICE)
    expected = x.double() @ weight.double().T
    for width in gpu_weight.WIDTHS:
        monkeypatch.setattr(packer, "_best_width", lambda *_, width=width: width)
        packed = packer.sliced(weight)
        assert packed.width == width
        y = triton_product.product(x, packed)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["floats", "int8", "int4", "int4, a scale a row"])
def test_windows_are_decoded_into_the_room_that_is_given(triton_product, monkeypatch, kind):
    monkeypatch.setattr(packer, "WINDOW_WEIGHTS", 32 * 56)
    rows, columns = 70, 50
    if kind == "floats":
        expected = pruned(rows, columns, 0.5).double()
        packed = packer.sliced(expected.float())
    else:
        group = columns if "row" in kind else 16
        codes, scales = coded(rows, columns, 8 if kind == "int8" else 4, group)
        packed, expected = packer.sliced(codes, scales, group), scaled(codes, scales, group)
    room = torch.full((packed.window, columns), float("nan"), device=DEVICE)
    assert triton_product.windows(packed) == [(0, 32), (32, 64), (64, 70)]
    for first, last in triton_product.windows(packed):
        found = triton_product.panel(packed, first, last, room)
        torch.testing.assert_close(found.double(), expected[first:last], rtol=1e-6, atol=0)


def test_kernels_are_launched_on_the_gpu_of_their_tensors(triton_product, monkeypatch):
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
        (triton_product, "_panel"),
        (sparsegpt_triton, "_solve_block"),
    ):
        monkeypatch.setattr(module, name, Kernel())
    packed = packer.sliced(pruned(40, 44, 0.5))
    triton_product.product(torch.randn(3, 44, device=DEVICE), packed)
    triton_product.panel(packed, 0, 40, torch.empty(64, 44, device=DEVICE))
    kept = torch.ones(4, 8, dtype=torch.bool)
    sparsegpt_triton.solve_block(
        torch.randn(4, 8), kept, torch.eye(4), torch.zeros(4).bool(), 0, 0, 0
    )
    assert launched == [(3, 44), (64, 44), (4, 8)]


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_every_way_gives_the_product(triton_product, monkeypatch, tokens):
    monkeypatch.setattr(packer, "WINDOW_WEIGHTS", 32 * 48)
    weight, x = pruned(40, 44, 0.5), torch.randn(tokens, 44, device=DEVICE)
    packed = packer.sliced(weight)
    for way in gpu_kernel.WAYS.values():
        torch.testing.assert_close(way(x, packed), x @ weight.T, rtol=1e-5, atol=1e-5)
    grad = torch.randn(tokens, 40, device=DEVICE)
    found = gpu_kernel._windows_transposed(grad, packed)
    torch.testing.assert_close(found, grad @ weight, rtol=1e-5, atol=1e-5)


# --- kernel and operator --------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Bitmask(), NMPacked(2, 4)], ids=["bitmask", "n:m"])
def test_the_kernel_gives_the_stored_form_back(fmt):
    weight = pruned(20, 36, 0) * NM(2, 4).mask(pruned(20, 36, 0).abs())
    kernel = kernel_of(weight, fmt)
    assert torch.equal(kernel.weight(torch.float32), weight)
    for key, tensor in fmt.pack(weight).items():
        assert torch.equal(kernel.packed(fmt, torch.float32)[key], tensor)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [None, 16])
def test_quantised_weights_come_back_as_they_were_stored(sym, size):
    weight, grid = pruned(20, 36, 0.5), Grid(4, size, sym)
    quantized = grid.fit(weight, weight != 0).round(weight)
    fmt = Quantized(grid, Bitmask())
    stored = fmt.pack(quantized)
    kernel = SlicedKernel.of(Stored(fmt, stored, (20, 36), torch.float32))
    torch.testing.assert_close(kernel.weight(torch.float32), quantized.dequantize())
    for key, tensor in kernel.packed(fmt, torch.float32).items():
        assert torch.equal(tensor, stored[key])


def test_on_a_cpu_the_kernel_stands_back():
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    weight = pruned(20, 36, 0.5)
    considered = SlicedKernel.consider(
        Stored(Bitmask(), Bitmask().pack(weight), (20, 36), torch.float32)
    )
    assert considered.kernel is None
    assert "NVIDIA" in considered.verdict.reason


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(36,), (2, 3, 36), (0, 36)])
def test_the_operator_multiplies_in_the_dtype_of_x(x_dtype, shape):
    weight, bias = pruned(20, 36, 0.5, torch.bfloat16), torch.randn(20, device=DEVICE)
    x = torch.randn(shape, device=DEVICE).to(x_dtype)
    y = kernel_of(weight).linear(x, bias)
    assert y.dtype == x_dtype
    tolerance = 3e-2 if x_dtype == torch.bfloat16 else 1e-5
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_inputs_on_another_device_are_refused():
    product = kernel_of(pruned(20, 36, 0.5))._product
    with pytest.raises(ValueError, match="on meta, the sparse weight on"):
        product(torch.randn(2, 36, device="meta"))


def test_gradients_of_the_operator_pass_gradcheck():
    kernel = kernel_of(pruned(20, 36, 0.5))
    x = torch.randn(3, 36, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(20, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(kernel.linear, (x, bias))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_of_sliced_weights_keeps_torch_s_rules():
    kernel = kernel_of(pruned(20, 36, 0.5))
    x = torch.randn(3, 36, device=DEVICE, requires_grad=True)
    torch.library.opcheck(sliced_linear, (x, *kernel.operands()))


@pytest.mark.filterwarnings("ignore")
def test_the_operator_compiles_and_exports_without_a_break():
    class Layer(torch.nn.Module):
        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def forward(self, x):
            return self.kernel.linear(x, None)

    layer = Layer(kernel_of(pruned(20, 36, 0.5)))
    x = torch.randn(4, 36, device=DEVICE)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected)


def test_foreign_tensors_are_checked_before_the_operator_uses_them():
    kernel = kernel_of(pruned(20, 36, 0.5))
    *tensors, scales, numbers = kernel.operands()
    tensors = [tensor.clone() for tensor in tensors]
    x = torch.randn(2, 36, device=DEVICE)
    torch.testing.assert_close(
        sliced_linear(x, *tensors, scales, numbers), F.linear(x, pruned(20, 36, 0.5))
    )
    tensors[1].fill_(-1)
    with pytest.raises(ValueError, match="gaps"):
        sliced_linear(x, *tensors, scales, numbers)
    with pytest.raises(ValueError, match="expected"):
        sliced_linear(x, *tensors, scales, [40, *numbers[1:]])


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_copies_of_the_kernel_multiply(copy_of):
    weight = pruned(20, 36, 0.5)
    kernel = copy_of(kernel_of(weight))
    x = torch.randn(2, 36, device=DEVICE)
    torch.testing.assert_close(kernel.linear(x, None), F.linear(x, weight))


def test_unstructured_and_uniform_rows_are_both_counted_exactly():
    weight = pruned(64, 100, 0)
    weight = weight * Unstructured(0.6).mask(weight.abs())
    packed = packer.sliced(weight)
    assert int(torch.count_nonzero(packed.values)) == 2560
