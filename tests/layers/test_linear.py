"""`SparseLinear` behaves as the `nn.Linear` that it replaces, and holds only what is packed."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse.core.patterns import NM
from hf_sparse.formats import FORMATS, Accepted
from hf_sparse.layers import SparseLinear

every_format = pytest.mark.parametrize("name", FORMATS)
LEADING = [(), (3,), (2, 3), (0,), (2, 1, 3)]


def every_product(test):
    """With and without a bias, of inputs of every rank."""
    for name, values in (("leading", LEADING), ("bias", [True, False])):
        test = pytest.mark.parametrize(name, values, ids=str)(test)
    return every_format(test)


def make_weight(out: int = 5, columns: int = 11, dtype=torch.float32) -> torch.Tensor:
    """2 of 4 kept, which every format takes."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:, 0::4] = 0
    weight[:, 3::4] = 0
    return weight


def sparse_layer(name: str, weight: torch.Tensor, bias: bool = True, dtype=None) -> SparseLinear:
    verdict = FORMATS[name].fits(weight, NM(2, 4))
    assert isinstance(verdict, Accepted)
    parameter = None
    if bias:
        generator = torch.Generator().manual_seed(1)
        parameter = nn.Parameter(torch.randn(len(weight), generator=generator).to(weight.dtype))
    shape = (weight.shape[0], weight.shape[1])
    packed = verdict.format.pack(weight)
    return SparseLinear(verdict.format, packed, shape, dtype or weight.dtype, parameter)


def dense_layer(sparse: SparseLinear, weight: torch.Tensor) -> nn.Linear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], sparse.bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if sparse.bias is not None:
            dense.bias.copy_(sparse.bias)
    return dense


def make_input(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@every_format
def test_it_passes_for_an_nn_linear(name):
    layer = sparse_layer(name, make_weight())
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (11, 5)
    assert layer.shape == (5, 11)
    assert isinstance(layer.bias, nn.Parameter)
    assert sparse_layer(name, make_weight(), bias=False).bias is None


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_reads_as_the_dense_weight(name, dtype):
    weight = make_weight(dtype=dtype)
    read = sparse_layer(name, weight).weight
    assert read.dtype == dtype
    assert torch.equal(read, weight)
    assert not read.requires_grad


@every_format
def test_the_values_of_a_parameter_that_is_assigned_are_taken_over(name):
    weight = make_weight()
    layer = sparse_layer(name, weight)
    layer.weight = nn.Parameter(2 * weight)
    assert torch.equal(layer.weight, 2 * weight)
    assert [n for n, _ in layer.named_parameters()] == ["bias"]


@every_format
def test_only_the_bias_is_a_parameter(name):
    assert [n for n, _ in sparse_layer(name, make_weight()).named_parameters()] == ["bias"]


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "dense"])
def test_it_holds_fewer_bytes_than_the_dense_weight(name):
    weight = make_weight(16, 64)
    held = sum(buffer.nbytes for buffer in sparse_layer(name, weight).buffers())
    assert held < 0.6 * weight.nbytes


@every_product
def test_the_product_is_the_dense_layer_s(name, bias, leading):
    weight = make_weight()
    layer, x = sparse_layer(name, weight, bias), make_input(*leading, 11)
    expected = x.double() @ weight.double().T
    if bias:
        expected = expected + layer.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@every_product
def test_gradients_of_input_and_bias_are_the_dense_layer_s(name, bias, leading):
    weight = make_weight()
    layer, x = sparse_layer(name, weight, bias), make_input(*leading, 11)
    dense = dense_layer(layer, weight)
    inputs, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = make_input(*leading, 5)
    (layer(inputs) * upstream).sum().backward()
    (dense(reference) * upstream).sum().backward()
    torch.testing.assert_close(inputs.grad, reference.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@every_format
def test_gradients_agree_with_finite_differences(name):
    layer = sparse_layer(name, make_weight(dtype=torch.float64))
    x = make_input(2, 3, 11, dtype=torch.float64).requires_grad_()

    def product(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"bias": bias}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.bias))


@every_format
def test_a_frozen_bias_and_an_input_without_gradient_get_none(name):
    layer = sparse_layer(name, make_weight())
    layer.bias.requires_grad_(False)
    assert not layer(make_input(3, 11)).requires_grad
    x = make_input(3, 11).requires_grad_()
    layer(x).sum().backward()
    assert layer.bias.grad is None
    assert x.grad is not None


@every_format
def test_the_dense_weight_is_not_kept_for_the_backward_pass(name):
    weight = make_weight(32, 64)
    layer = sparse_layer(name, weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        layer(make_input(3, 64).requires_grad_())
    held = {tensor.untyped_storage().data_ptr() for tensor in layer.packed.values()}
    assert saved
    assert set(saved) <= held


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_change_weight_bias_and_product_as_a_dense_layer_s(name, dtype):
    weight = make_weight()
    layer = sparse_layer(name, weight).to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.weight, weight.to(dtype))
    x = make_input(3, 11, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, weight.to(dtype), layer.bias))
    back = layer.float()
    assert back.weight.dtype == torch.float32
    assert torch.equal(back.weight, weight.to(dtype).float())


@every_format
def test_a_cast_leaves_masks_and_indices_alone(name):
    layer = sparse_layer(name, make_weight())
    before = {k: t.clone() for k, t in layer.packed.items() if not t.is_floating_point()}
    layer.half()
    for key, tensor in before.items():
        assert layer.packed[key].dtype == torch.uint8
        assert torch.equal(layer.packed[key], tensor)


@every_format
def test_narrow_values_may_serve_a_wider_weight(name):
    # A bf16 checkpoint loaded in fp32 keeps its bf16 values.
    weight = make_weight(dtype=torch.bfloat16)
    layer = sparse_layer(name, weight, bias=False, dtype=torch.float32)
    assert layer.packed["weight"].dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    x = make_input(3, 11)
    assert torch.equal(layer(x), F.linear(x, weight.float()))


@every_format
def test_moving_to_another_device_moves_everything(name):
    layer = sparse_layer(name, make_weight()).to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.weight_dtype == torch.float32


@every_format
def test_autocast_gives_the_dtype_that_a_dense_layer_gives(name):
    weight = make_weight()
    layer = sparse_layer(name, weight)
    dense = dense_layer(layer, weight)
    x, reference = (make_input(3, 11).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), dense(reference)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, reference.grad, rtol=0.02, atol=0.02)


@every_format
def test_the_state_dict_holds_packed_tensors_and_bias_and_loads_back(name):
    weight = make_weight()
    layer = sparse_layer(name, weight)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    companions = {key for key in layer.packed if key != "weight"}
    assert set(state) == {"bias", "weight_values"} | companions
    other = sparse_layer(name, make_weight())
    with torch.no_grad():
        other.bias.zero_()
        for tensor in other.packed.values():
            tensor.zero_()
    assert not torch.equal(other.weight, weight)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other.weight, weight)
    assert torch.equal(other.bias, layer.bias)


@every_format
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(name, how):
    weight = make_weight()
    layer = sparse_layer(name, weight)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other.weight, weight)
    assert torch.equal(other.bias, layer.bias)
    assert other.format == layer.format
    x = make_input(3, 11)
    assert torch.equal(other(x), layer(x))
    other.half()
    with torch.no_grad():
        other.bias.zero_()
        other.packed["weight"].zero_()
    assert torch.equal(layer.weight, weight)
    assert bool(layer.bias.any())


@every_format
def test_the_repr_tells_sizes_format_and_its_parameters(name):
    layer = sparse_layer(name, make_weight())
    text = repr(layer)
    assert "in_features=11, out_features=5, bias=True" in text
    assert f"format={name}" in text
    for key, value in layer.format.parameters().items():
        assert f"{key}={value}" in text


@every_format
def test_integers_are_refused_since_the_weight_would_be_rounded_to_them(name):
    layer = sparse_layer(name, make_weight())
    for _ in ("stored", "resolved"):
        with pytest.raises(TypeError, match=r"x is torch\.int64"):
            layer(torch.ones(2, 11, dtype=torch.int64))
        layer.resolve()
