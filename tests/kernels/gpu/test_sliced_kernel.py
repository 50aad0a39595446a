"""The kernel of the sliced layout and its operator: on a CPU decoded, or on a GPU where one is."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from sliced_weights import DEVICE, kernel_of, pruned

from hf_sparse.core.grids import Grid
from hf_sparse.core.patterns import NM
from hf_sparse.formats import Bitmask, Quantized
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import Stored
from hf_sparse.kernels.gpu.kernel import SlicedKernel


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
    product = kernel_of(pruned(20, 36, 0.5)).product
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
    torch.library.opcheck(SlicedKernel.operators[0], (x, *kernel.operands()))


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
        SlicedKernel.operators[0](x, *tensors, scales, numbers), F.linear(x, pruned(20, 36, 0.5))
    )
    tensors[1].fill_(-1)
    with pytest.raises(ValueError, match="gaps"):
        SlicedKernel.operators[0](x, *tensors, scales, numbers)
    with pytest.raises(ValueError, match="expected"):
        SlicedKernel.operators[0](x, *tensors, scales, [40, *numbers[1:]])


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_copies_of_the_kernel_multiply(copy_of):
    weight = pruned(20, 36, 0.5)
    kernel = copy_of(kernel_of(weight))
    x = torch.randn(2, 36, device=DEVICE)
    torch.testing.assert_close(kernel.linear(x, None), F.linear(x, weight))
