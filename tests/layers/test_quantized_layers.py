"""Sparse layers that hold codes: products, casts, and the stored form whatever the kernel."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse import SparseLinear
from hf_sparse.core.errors import FormatError
from hf_sparse.core.grids import Grid, QuantizedWeight
from hf_sparse.core.patterns import NM
from hf_sparse.formats import FORMATS, choose_format
from hf_sparse.kernels.cpu import library
from hf_sparse.kernels.cpu.kernel import TileKernel
from hf_sparse.layers.held import buffer_name
from hf_sparse.layers.replace import pack_linear

SHAPE = (20, 36)
EIGHT, FOUR, THREE = Grid(8, 16, True), Grid(4, 16, True), Grid(3, None, True)
WIDE = Grid(8, 16, False)  # codes beyond int8
ASYMMETRIC = Grid(4, 16, False)  # codes beyond int4
ODD = Grid(4, 5, True)
GRIDS = {
    "8": EIGHT, "4": FOUR, "3": THREE, "8 asym": WIDE, "4 asym": ASYMMETRIC, "odd groups": ODD,
}  # fmt: skip
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_layout = pytest.mark.parametrize("layout", FORMATS)


def codes_of(grid: Grid, shape=SHAPE) -> QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    weight = weight.abs() - 0.1 if grid is WIDE else weight
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0)
    return grid.fit(weight).round(weight)


def layer_of(weight: QuantizedWeight, layout="bitmask", dtype=torch.float32, bias=True):
    """As the pipeline makes it: from a dense layer that holds the rounded weight."""
    dense = weight.dequantize().to(dtype)
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(dense)
    fmt = choose_format(weight, NM(2, 4), layout)
    layer = pack_linear(linear, weight, fmt)
    layer.resolve()
    return layer


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert torch.equal(tensor, second[key])


@pytest.mark.parametrize(
    ("grid", "kernel", "reason"),
    [
        (EIGHT, "tile", None),
        (FOUR, "tile", None),
        (THREE, "tile", None),
        (ASYMMETRIC, "tile", None),
        (WIDE, "dense", "takes codes of 8 bits with sign, these are"),
        (ODD, "dense", "groups of an even number of columns, these have 5"),
    ],
    ids=GRIDS,
)
def test_codes_go_to_the_native_kernel_or_the_trace_says_why_not(grid, kernel, reason):
    layer = layer_of(codes_of(grid))
    assert layer.kernel.name == kernel
    assert reason is None or reason in layer.trace[2].reason


@every_grid
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_stored_form_survives_the_kernel_to_the_bit(grid, layout, dtype):
    weight = codes_of(grid)
    layer = layer_of(weight, layout, dtype)
    stored = layer.format.pack(weight)
    assert_same_tensors(layer.packed, stored)
    state = {key: tensor for key, tensor in layer.state_dict().items() if key != "bias"}
    assert_same_tensors(state, {buffer_name(key): t for key, t in stored.items()})
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, weight.dequantize().to(dtype))


@every_grid
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(36,), (1, 36), (2, 5, 36), (0, 36)], ids=str)
def test_products_are_those_of_code_times_scale(grid, x_dtype, shape):
    weight = codes_of(grid)
    layer = layer_of(weight)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    with torch.no_grad():
        y = layer(x)
    bias = layer.bias.detach().double()
    expected = F.linear(x.double(), weight.dequantize().double(), bias)
    assert y.dtype == x_dtype
    tolerance = 3e-2 if x_dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@every_grid
@pytest.mark.parametrize("resolved", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_leave_codes_scales_and_zero_points_alone(grid, resolved, dtype):
    weight = codes_of(grid)
    layer = layer_of(weight)
    stored = layer.format.pack(weight)
    if not resolved:
        layer = SparseLinear(layer.format, stored, SHAPE, torch.float32)
    layer.to(dtype)
    assert_same_tensors(layer.packed, stored)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, weight.dequantize().to(dtype))
    layer.half().float()
    assert_same_tensors(layer.packed, stored)
    assert torch.equal(layer.weight, weight.dequantize())


def test_moving_to_meta_keeps_the_dtypes():
    layer = layer_of(codes_of(FOUR)).to("meta")
    assert {key: t.dtype for key, t in layer.packed.items()} == {
        "weight": torch.uint8, "weight_bitmask": torch.uint8, "weight_scales": torch.bfloat16,
    }  # fmt: skip
    assert all(tensor.is_meta for tensor in layer.packed.values())


@pytest.mark.parametrize(
    ("grid", "limit"),
    [(Grid(8, 128, True), 0.34), (Grid(4, 128, True), 0.21), (Grid(3, 128, True), 0.21)],
    ids=["8", "4", "3"],
)
def test_resident_bytes_are_those_of_the_codes(grid, limit):
    layer = layer_of(codes_of(grid, (512, 768)), dtype=torch.bfloat16, bias=False)
    assert layer.kernel.name == "tile"
    assert layer.resident_bytes() <= limit * 2 * 512 * 768
    assert set(dict(layer.named_buffers())) == set(layer.kernel.tensors())


@every_grid
def test_gradients_of_the_input_are_the_dense_layer_s(grid):
    weight = codes_of(grid)
    layer = layer_of(weight)
    x, other = (torch.ones(5, 36).cumsum(1).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    F.linear(other, weight.dequantize(), layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grid", [EIGHT, FOUR, ASYMMETRIC], ids=["8", "4", "4 asym"])
def test_the_operator_keeps_torch_s_rules_for_codes(grid):
    operands = layer_of(codes_of(grid)).kernel.operands()
    x = torch.randn(3, 36, requires_grad=True)
    torch.library.opcheck(TileKernel.operators[0], (x, *operands))
    x = torch.randn(2, 36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: TileKernel.operators[0](x, *operands), (x,))


def test_codes_that_belong_to_no_weight_are_checked_before_they_are_used():
    weight = codes_of(FOUR)
    masks, base, offsets, values, scales, *numbers = layer_of(weight).kernel.operands()
    x = torch.randn(2, 36)
    good = TileKernel.operators[0](
        x, masks.clone(), base, offsets, values, scales.clone(), *numbers
    )
    torch.testing.assert_close(good, F.linear(x, weight.dequantize()))
    with pytest.raises(library.NativeError, match="too small"):
        TileKernel.operators[0](
            x, masks.clone(), base, offsets, values[:-1].clone(), scales, *numbers
        )
    with pytest.raises(ValueError, match="scales"):
        TileKernel.operators[0](
            x, masks.clone(), base, offsets, values, scales[:, :1].clone(), *numbers
        )
    with pytest.raises(ValueError, match="scales"):
        TileKernel.operators[0](x, masks.clone(), base, offsets, values, None, *numbers)


@every_grid
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_multiply_and_store_by_themselves(grid, copy_of):
    layer = layer_of(codes_of(grid))
    x = torch.randn(2, 36)
    expected, stored = layer(x), layer.packed
    other = copy_of(layer)
    del layer
    assert torch.equal(other(x), expected)
    assert_same_tensors(other.packed, stored)
    for name, tensor in other.named_buffers():
        assert tensor.data_ptr() == other.kernel.tensors()[name].data_ptr()


@every_grid
def test_loading_a_state_dict_is_checked_and_resolved_again(grid):
    first, second = layer_of(codes_of(grid)), layer_of(codes_of(grid))
    with torch.no_grad():
        second.load_state_dict(
            {**second.state_dict(), "weight_scales": second.packed["weight_scales"] * 2}
        )
    first.load_state_dict(second.state_dict())
    assert first.kernel is not None
    assert torch.equal(first.weight, 2 * codes_of(grid).dequantize())
    bad = second.state_dict()
    bad["weight_scales"] = -bad["weight_scales"]
    with pytest.raises(FormatError, match="weight_scales"):
        first.load_state_dict(bad)


def test_without_the_library_the_codes_are_kept_beside_the_dense_weight(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: "no _tiles library in /somewhere")
    weight = codes_of(FOUR)
    layer = layer_of(weight, dtype=torch.bfloat16)
    assert layer.kernel.name == "dense"
    assert_same_tensors(layer.packed, layer.format.pack(weight))
    assert layer.resident_bytes() == 20 * 36 * 2 + sum(t.nbytes for t in layer.packed.values())
