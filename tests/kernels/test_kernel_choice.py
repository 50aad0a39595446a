"""The choice of kernels, the torch operator, and what a layer holds and gives back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.formats import Bitmask, choose_format
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import Stored, choose
from hf_sparse.kernels.cpu import library, native_kernel, product, speed
from hf_sparse.kernels.cpu.kernel import TileKernel
from hf_sparse.kernels.cpu.pack import narrow, pack_dense
from hf_sparse.kernels.cpu.product import Product
from hf_sparse.kernels.token_classes import class_of, fastest
from hf_sparse.layers.held import buffer_name

SIXTY = Unstructured(0.6)


def pruned(rows=20, columns=36, pattern=SIXTY, dtype=torch.float32):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return weight.where(pattern.mask(weight.abs()), 0).to(dtype)


def layer_of(weight, fmt=None, bias=None):
    fmt = fmt or Bitmask()
    layer = SparseLinear(fmt, fmt.pack(weight), tuple(weight.shape), weight.dtype, bias)
    layer.resolve()
    return layer


def kernel_of(weight, fmt=None):
    fmt = fmt or Bitmask()
    stored = Stored(fmt, fmt.pack(weight), tuple(weight.shape), weight.dtype)
    return choose(stored).kernel


@pytest.fixture
def without_binary(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: "no _tiles library in /somewhere")
    native_kernel._warn_once.cache_clear()
    yield
    native_kernel._warn_once.cache_clear()


@pytest.mark.parametrize("fmt", [Bitmask(), NMPacked(2, 4)], ids=["bitmask", "n:m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resolved_layer_holds_the_kernel_s_tensors_only_and_gives_the_stored_form_back(
    fmt, dtype
):
    weight = pruned(pattern=NM(2, 4), dtype=dtype)
    stored = fmt.pack(weight)
    layer = layer_of(weight, fmt)
    assert layer.kernel.name == "tile"
    assert set(dict(layer.named_buffers())) == set(layer.kernel.tensors())
    assert torch.equal(layer.weight, weight)
    state = layer.state_dict()
    assert set(state) == {buffer_name(key) for key in stored}
    for key, tensor in stored.items():
        assert torch.equal(layer.packed[key], tensor)
        assert torch.equal(state[buffer_name(key)], tensor)


@pytest.mark.parametrize(
    ("sparsity", "limit"), [(0.5, 0.57), (0.6, 0.47), (0.7, 0.37), (0.8, 0.27)]
)
def test_resident_bytes_stay_near_those_of_the_values(sparsity, limit):
    weight = pruned(512, 768, Unstructured(sparsity), torch.bfloat16)
    assert layer_of(weight).resident_bytes() <= limit * 2 * weight.numel()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(36,), (1, 36), (2, 3, 36), (0, 36)])
def test_products_agree_with_the_dense_layer_in_the_dtype_of_x(x_dtype, shape):
    weight, bias = pruned(dtype=torch.bfloat16), torch.randn(20)
    layer = layer_of(weight, bias=torch.nn.Parameter(bias, requires_grad=False))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    y = layer(x)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == x_dtype
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(x_dtype, 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_pass_gradcheck():
    kernel = kernel_of(pruned())
    x = torch.randn(3, 36, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: kernel.linear(x, b), (x, bias))


def test_the_gradient_in_fp32_is_the_dense_layer_s():
    weight = pruned()
    layer = layer_of(weight)
    x = torch.randn(5, 36, requires_grad=True)
    layer(x).square().sum().backward()
    other = x.detach().double().requires_grad_()
    dense = weight.double()
    F.linear(other, dense).square().sum().backward()
    # Both products sum in fp32: a unit for each term of the sums behind an element, of their size.
    terms = (2 * other.detach().abs() @ dense.abs().T) @ dense.abs()
    assert bool(((x.grad - other.grad).abs() <= 2.0**-24 * sum(weight.shape) * terms).all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_keeps_torch_s_rules():
    kernel = kernel_of(pruned())
    torch.library.opcheck(
        TileKernel.operators[0], (torch.randn(3, 36, requires_grad=True), *kernel.operands())
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # compiles C++
)
def test_compiled_and_exported_layers_give_the_eager_result(backend):
    layer = layer_of(pruned(), bias=torch.nn.Parameter(torch.randn(20)))
    x = torch.randn(4, 36)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(
            torch.compile(layer, fullgraph=True, backend=backend)(x), expected
        )
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected)


def test_tensors_that_belong_to_no_weight_are_checked_before_they_are_used():
    tensors = [t.clone() for t in kernel_of(pruned()).tensors().values()]
    x = torch.randn(2, 36)
    good = TileKernel.operators[0](x, *tensors, None, 20, 36, 0, 36)
    torch.testing.assert_close(good, F.linear(x, pruned()))
    tensors[0][0, 0] = -1  # all 32 weights of a pair are kept, says the mask
    with pytest.raises(library.NativeError):
        TileKernel.operators[0](x, *tensors, None, 20, 36, 0, 36)
    with pytest.raises(ValueError, match="shape"):
        TileKernel.operators[0](x, *tensors, None, 40, 36, 0, 36)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_multiply_by_themselves(copy_of):
    layer = layer_of(pruned())
    x = torch.randn(2, 36)
    other = copy_of(layer)
    expected = layer(x)
    del layer
    assert torch.equal(other(x), expected)
    assert set(other.kernel.tensors()) == set(dict(other.named_buffers()))
    for name, tensor in other.named_buffers():
        assert tensor.data_ptr() == other.kernel.tensors()[name].data_ptr()


def test_casts_go_through_the_stored_form():
    weight = pruned(dtype=torch.float32)
    layer = layer_of(weight).to(torch.bfloat16)
    assert layer.kernel.name == "tile"
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    assert layer.packed["weight"].dtype == torch.bfloat16
    meta = layer.to("meta")
    assert meta.kernel is None
    assert all(tensor.is_meta for tensor in meta.packed.values())


def test_loading_a_state_dict_is_checked_and_resolved_again():
    first, second = layer_of(pruned()), layer_of(-pruned())
    first.load_state_dict(second.state_dict())
    assert first.kernel is not None
    assert torch.equal(first.weight, second.weight)
    bad = second.state_dict()
    bad["weight_bitmask"] = bad["weight_bitmask"] ^ 1
    with pytest.raises(hf_sparse.FormatError, match="weight_bitmask"):
        first.load_state_dict(bad)


def test_without_the_binary_layers_are_dense_and_one_warning_says_so(without_binary, tiny, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    report = hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    logging.disable_propagation()
    warnings = {id(r): r for r in caplog.records if "decoded to dense" in r.message}
    assert [r.levelname for r in warnings.values()] == ["WARNING"]
    assert {layer.kernel for layer in report.layers} == {"dense"}
    assert report.bytes_resident == report.bytes_before > report.bytes_after
    assert "the saving is on disk only" in report.summary()
    layer = tiny.model.layers[0].mlp.up_proj
    assert "no _tiles library" in layer.trace[2].reason
    weight = layer.weight
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), F.linear(x, weight))
    assert torch.equal(layer.packed["weight"], weight[weight != 0])


def test_offloaded_and_unresolved_layers_use_the_reference_path():
    weight = pruned()
    fmt = Bitmask()
    layer = SparseLinear(fmt, fmt.pack(weight), tuple(weight.shape), weight.dtype)
    assert layer.kernel is None
    x = torch.randn(3, 36)
    torch.testing.assert_close(layer(x), F.linear(x, weight))


def test_each_class_of_tokens_takes_the_way_that_is_clearly_the_fastest(monkeypatch, tiny):
    found = {
        "1": {"packed": 1 / 2, "dense": 1},
        "2-32": {"packed": 1 / 3, "dense": 1},
        "33-511": {"packed": 1, "decoded": 1 / 1.05, "dense": 1},
        "512+": {"packed": 1 / 0.7, "decoded": 1 / 0.9, "dense": 1},
    }
    monkeypatch.setattr(speed, "estimate", lambda w, d: found)
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    layer = hf_sparse.explain(tiny).layers[0]
    assert [way.name for way in layer.ways] == ["packed", "packed", "packed", "decoded"]
    assert [way.speedup for way in layer.ways] == pytest.approx([2.0, 3.0, 1.0, 0.9])
    assert "for 512+ decoded 0.90, packed 0.70" in hf_sparse.explain(tiny).verbose()


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 0), (2, 1), (32, 1), (33, 2), (511, 2), (512, 3), (9999, 3)]
)
def test_every_number_of_tokens_has_a_class(tokens, expected):
    assert class_of(tokens, product.CLASSES) == expected


def test_the_operator_takes_the_way_of_the_weight_that_its_tensors_belong_to(monkeypatch):
    kernel = TileKernel(
        Product(pack_dense(pruned()), fastest({"1": {"decoded": 1.0}}, product.CLASSES))
    )
    calls = []
    monkeypatch.setitem(product.WAYS, "decoded", lambda x, w, b: calls.append(b) or x @ x.T)
    x = torch.randn(1, 36)
    kernel.linear(x, None)
    TileKernel.operators[0](x, *kernel.operands())
    assert len(calls) == 2
    TileKernel.operators[0](torch.randn(2, 36), *kernel.operands())
    assert len(calls) == 2


def test_every_kernel_that_was_turned_down_has_a_reason():
    weight = pruned(dtype=torch.float64)
    fmt = choose_format(weight, Unstructured(0.6), "auto")
    choice = choose(Stored(fmt, fmt.pack(weight), (20, 36), torch.float64))
    assert [v.kernel for v in choice.trace] == [
        "integer",
        "columns",
        "tile",
        "2:4",
        "sliced",
        "dense",
    ]
    assert [v.accepted for v in choice.trace] == [False] * 5 + [True]
    assert "no kernel for values in torch.float64" in choice.trace[2].reason
    assert isinstance(kernel_of(pruned()), TileKernel)


@pytest.mark.parametrize("fmt", [Bitmask(), NMPacked(2, 4)], ids=["bitmask", "n:m"])
def test_a_default_device_has_no_influence(fmt):
    weight, x = pruned(pattern=NM(2, 4)), torch.randn(3, 36)
    expected = layer_of(weight, fmt)
    stored = fmt.pack(weight)
    with torch.device("meta"):  # as accelerate and transformers build models
        layer = layer_of(weight, fmt)
        product, dense, state = layer(x), layer.weight, layer.state_dict()
        codes = pack_dense(torch.ones(16, 4, dtype=torch.int8, device="cpu"), x.new_ones(16), 4)
        narrow(codes)
    assert torch.equal(product, expected(x))
    assert torch.equal(dense, weight)
    assert all(torch.equal(state[buffer_name(key)], tensor) for key, tensor in stored.items())
