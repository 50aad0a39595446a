"""2:4 through torch's semi-structured tensors: whom they suit, and that they hold our weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hf_sparse.core.patterns import NM
from hf_sparse.formats import Bitmask
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import Stored
from hf_sparse.kernels.gpu import semi_structured
from hf_sparse.kernels.gpu.semi_structured import SemiStructuredKernel

BOTH = [SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS]


def stored(fmt, dtype=torch.bfloat16, layer_dtype=None, shape=(32, 64)):
    weight = torch.randn(shape)
    weight = (weight * NM(2, 4).mask(weight.abs())).to(dtype)
    return Stored(fmt, fmt.pack(weight), shape, layer_dtype or dtype)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (stored(Bitmask()), "2:4"),
        (stored(NMPacked(4, 8)), "2:4"),
        (stored(NMPacked(2, 4), torch.float32), "fp16 and bf16"),
        (stored(NMPacked(2, 4), layer_dtype=torch.float32), "fp16 and bf16"),
    ],
)
def test_other_weights_are_left_to_other_kernels(weight, reason):
    assert reason in SemiStructuredKernel.obstacle(weight)
    assert SemiStructuredKernel.consider(weight).kernel is None


def test_the_device_is_named_when_it_is_the_obstacle():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "NVIDIA" in SemiStructuredKernel.obstacle(stored(NMPacked(2, 4)))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((32, 64), (True, True)), ((16, 16), (True, False)), ((48, 64), (True, False)),
     ((8, 64), (False, False)), ((32, 40), (False, False)), ((4096, 14336), (True, True))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_follow_the_rules_of_the_backend(shape, fits, dtype):
    found = tuple(semi_structured.misfit(shape, dtype, backend) is None for backend in BOTH)
    assert found == fits


def test_our_2_4_weights_survive_torch_s_form_and_take_0_5625_of_the_bytes():
    weight = stored(NMPacked(2, 4), shape=(64, 128))
    dense = weight.dense(torch.bfloat16)
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    assert values.nbytes + meta.nbytes == 0.5625 * dense.nbytes
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), dense)


def test_tensors_of_no_layer_are_refused():
    with pytest.raises(ValueError, match="belong to no 2:4 layer"):
        SemiStructuredKernel.operators[0](torch.randn(2, 64), torch.randn(32, 32), None, 32, 64)


# --- torch's own tensors, with a product on the CPU in place of the GPU's -----------------------


@pytest.fixture
def kernel(monkeypatch):
    """A kernel whose tensors are torch's, and torch's the way to the product; bf16, 64 x 128."""
    cutlass = SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(cutlass, "_validate_device_dim_dtype_shape", lambda dense: None)
    monkeypatch.setattr(cutlass, "_PROTOTYPE_WARNING_SHOWN", False)
    monkeypatch.setattr(semi_structured, "_backend", lambda: cutlass)

    def product(values, meta, other):
        return sparse_semi_structured_to_dense_cutlass(values, meta) @ other

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    weight = stored(NMPacked(2, 4), shape=(64, 128)).dense(torch.bfloat16)
    return SemiStructuredKernel(semi_structured.SemiStructuredWeight.of(weight))


@pytest.mark.parametrize("shape", [(128,), (0, 128), (3, 128), (2, 3, 128), (2, 0, 128)])
@pytest.mark.parametrize("grad", [False, True])
def test_inputs_of_any_shape_are_multiplied(kernel, shape, grad):
    x = torch.randn(shape).bfloat16().requires_grad_(grad)
    y = kernel.linear(x, None)
    weight = kernel.weight(torch.bfloat16)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=2e-2, atol=2e-2)
    if grad:
        y.sum().backward()
        expected = torch.ones_like(y).double() @ weight.double()
        torch.testing.assert_close(x.grad.double(), expected, rtol=2e-2, atol=2e-2)


def test_inputs_that_are_not_contiguous_are_multiplied(kernel):
    x = torch.randn(128, 5, 2).bfloat16().permute(2, 1, 0)
    expected = F.linear(x, kernel.weight(torch.bfloat16))
    torch.testing.assert_close(kernel.linear(x, None), expected, rtol=2e-2, atol=2e-2)


def test_autocast_to_the_other_half_type_changes_nothing(kernel):
    x = torch.randn(3, 128).bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        found = kernel.linear(x, None)
    assert torch.equal(found, kernel.linear(x, None))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_copies_have_tensors_of_their_own(kernel, copy_of):
    copied = copy_of(kernel)
    for name, tensor in kernel.tensors().items():
        assert torch.equal(copied.tensors()[name], tensor)
        assert copied.tensors()[name].data_ptr() != tensor.data_ptr()
    x = torch.randn(3, 128).bfloat16()
    torch.testing.assert_close(copied.linear(x, None), kernel.linear(x, None))


def test_a_copied_layer_holds_its_weight_once(kernel):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = kernel
            for name, tensor in kernel.tensors().items():
                self.register_buffer(name, tensor)

    copied = copy.deepcopy(Layer())
    for name, tensor in copied.kernel.tensors().items():
        assert getattr(copied, name) is tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_of_2_4_weights_compiles_without_a_break(kernel, grad):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = kernel

        def forward(self, x):
            return self.kernel.linear(x, None)

    layer = Layer()
    x = torch.randn(3, 128).bfloat16().requires_grad_(grad)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, kernel.linear(x, None))


@pytest.mark.parametrize(
    ("capability", "backend", "reason"),
    [
        ((7, 5), BOTH[0], "no sparse matrix units"),
        ((8, 9), BOTH[0], None),
        ((8, 9), BOTH[1], None),
        ((9, 0), BOTH[0], None),
        ((9, 0), BOTH[1], "no cuSPARSELt"),
    ],
)
def test_gpus_follow_the_rules_of_the_backend(monkeypatch, capability, backend, reason):
    monkeypatch.setattr(Stored, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(semi_structured, "_backend", lambda: backend)
    found = SemiStructuredKernel.obstacle(stored(NMPacked(2, 4)))
    assert found is None if reason is None else reason in found


def test_what_torch_refuses_is_left_to_other_kernels(kernel, monkeypatch):
    def product(values, meta, other):
        raise RuntimeError("CUDA error: architecture mismatch\nand more")

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    monkeypatch.setattr(SemiStructuredKernel, "obstacle", staticmethod(lambda stored: None))
    considered = SemiStructuredKernel.consider(stored(NMPacked(2, 4)))
    assert considered.kernel is None
    assert considered.verdict.reason == "torch refuses: CUDA error: architecture mismatch"
