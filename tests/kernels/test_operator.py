"""Operators of packed weights: found by their tensors, checked, and right whatever watches them."""

import gc

import pytest
import torch
import torch.nn.functional as F
from sliced_weights import kernel_of as sliced_kernel_of
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse.formats import Bitmask
from hf_sparse.kernels import Stored, choose
from hf_sparse.kernels.operator import AliveWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT = torch.randn(20, 36, generator=torch.Generator().manual_seed(1))
WEIGHT[:, ::2] = 0


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["tile", "sliced"])
def kernel(request):
    if request.param == "sliced":
        return sliced_kernel_of(WEIGHT.to(DEVICE))
    stored = Stored(Bitmask(), Bitmask().pack(WEIGHT), (20, 36), torch.float32)
    return choose(stored).kernel


@pytest.fixture
def layer(kernel):
    return lambda x: kernel.linear(x, None)


@pytest.fixture
def x(kernel):
    return normal(3, 36).to(next(iter(kernel.tensors().values())).device)


def close(found, expected):
    torch.testing.assert_close(found, expected.to(found.device), rtol=1e-4, atol=1e-4)


# --- who watches ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "record", [lambda f, x: torch.jit.trace(f, (x,)), lambda f, x: make_fx(f)(x)]
)
def test_a_recorded_call_multiplies_other_inputs(layer, x, record):
    other = normal(5, 36, seed=9).to(x)
    with torch.no_grad():
        recorded = record(layer, x)
        close(recorded(other), other.cpu() @ WEIGHT.T)


def test_a_mode_sees_the_operator(layer, x):
    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Seen():
        layer(x)
    assert any("linear" in name and "hf_sparse" in name for name in names)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_batch_of_inputs_is_multiplied_by_vmap(layer, x, dim):
    found = torch.func.vmap(layer, in_dims=dim)(x if dim == 0 else x.T)
    close(found, x.cpu() @ WEIGHT.T)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own modules
def test_derivatives_by_torch_func_are_those_of_a_dense_layer(layer, x):
    one, square = x[0], lambda f: lambda x: f(x).pow(3).sum()
    dense = lambda x: x @ WEIGHT.T.to(x)  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(transform(layer)(one), WEIGHT)
    close(torch.func.grad(square(layer))(x), torch.func.grad(square(dense))(x))
    close(torch.func.hessian(square(layer))(one), torch.func.hessian(square(dense))(one))
    tangent = normal(3, 36, seed=5).to(x)
    close(torch.func.jvp(layer, (x,), (tangent,))[1], dense(tangent))


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own modules
def test_forward_mode_carries_the_tangent(layer, x):
    tangent = normal(3, 36, seed=5).to(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    close(found.tangent, tangent.cpu() @ WEIGHT.T)


def test_second_derivatives_pass_gradgradcheck(layer, x):
    assert torch.autograd.gradgradcheck(layer, (x.double().requires_grad_(),))


def test_a_view_that_is_negated_when_it_is_read_keeps_its_sign(layer, x):
    with torch.no_grad():
        close(layer(torch._neg_view(x)), -x.cpu() @ WEIGHT.T)


# --- what is checked ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_inputs_that_are_no_floats_are_refused(kernel, x, dtype):
    for multiply in (lambda x: kernel.linear(x, None), lambda x: call(kernel, x)):
        with pytest.raises(TypeError, match=f"x is {dtype}"), torch.no_grad():
            multiply(x.to(dtype))


@pytest.mark.parametrize("shape", [(), (35,), (3, 37), (36, 3), (0,), (2, 0)])
def test_inputs_of_another_width_are_refused(kernel, x, shape):
    for multiply in (lambda x: kernel.linear(x, None), lambda x: call(kernel, x)):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 36\)"), torch.no_grad():
            multiply(x.new_zeros(shape))


def call(kernel, x):
    return kernel.operators[0](x, *kernel.operands())


def test_inputs_and_weights_on_two_devices_are_refused(kernel, x):
    with pytest.raises(ValueError, match="on meta"):
        call(kernel, x.to("meta"))
    operands = list(kernel.operands())
    operands[0] = operands[0].to("meta")
    with pytest.raises(ValueError, match="on meta"):
        kernel.operators[0](x, *operands)


def test_other_views_of_a_weight_s_memory_are_checked_anew(kernel, x):
    operands = list(kernel.operands())
    for at, operand in enumerate(operands):
        if not isinstance(operand, torch.Tensor):
            continue
        for view in (operand.flatten(), operand[:-1], operand.view(torch.uint8), operand[::2]):
            if view.shape == operand.shape and view.dtype == operand.dtype:
                continue
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                kernel.operators[0](x, *operands[:at], view, *operands[at + 1 :])


def test_weights_are_found_while_they_live():
    class Weight:
        pass

    checked = []
    alive, weight, tensor = (
        AliveWeights(lambda *operands: checked.append(operands)),
        Weight(),
        WEIGHT,
    )
    alive.add(weight, (tensor, 3, [1, 2]))
    assert alive.find(tensor, 3, [1, 2]) is weight
    assert checked == []
    alive.find(tensor, 4, [1, 2])
    alive.find(tensor.T, 3, [1, 2])
    alive.find(tensor.clone(), 3, [1, 2])
    assert len(checked) == 3
    del weight
    gc.collect()
    assert alive.find(tensor, 3, [1, 2]) is None


def test_a_bias_is_added_and_trains(kernel, x):
    bias = normal(20).to(x).requires_grad_()
    y = kernel.linear(x, bias)
    close(y.detach(), F.linear(x.cpu(), WEIGHT, bias.detach().cpu()))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3))
