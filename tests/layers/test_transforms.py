"""What traces, transforms or exports a sparse layer gets what the dense one gives, or an error."""

import pytest
import torch
import torch.autograd.forward_ad as fwad
from tiny_models import DECODER, build
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

import hf_sparse
from hf_sparse import ConfigError, SparseLinear
from hf_sparse.core.low_rank import LowRank
from hf_sparse.formats import Bitmask

# torch's own: of torch.jit, also where torch.func uses it, and of what a trace takes as constant.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def stored(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 16, generator=generator, dtype=dtype)
    weight *= weight.abs() > 0.7
    factors = (torch.randn(size, generator=generator, dtype=dtype) for size in ((24, 2), (2, 16)))
    bias = nn.Parameter(torch.randn(24, generator=generator, dtype=dtype))
    packed = Bitmask().pack(weight)
    return SparseLinear(Bitmask(), packed, (24, 16), dtype, bias, low_rank=LowRank(*factors))


def resolved():
    layer = stored()
    layer.resolve()
    assert layer.kernel is not None
    return layer


def trained():
    layer = stored()
    layer.train_values(torch.float32)
    return layer


def dense(sparse):
    layer = nn.Linear(16, 24)
    layer.weight = nn.Parameter(sparse.matrix.detach())
    layer.bias = nn.Parameter(sparse.bias.detach())
    return layer


def square(layer):
    return lambda x: layer(x).pow(2).sum()


def forward_mode(layer):
    with fwad.dual_level():
        return fwad.unpack_dual(layer(fwad.make_dual(X, X))).tangent


def hessian_product(layer):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(square(layer)(x), x, create_graph=True)
    return torch.autograd.grad(grad.sum(), x)[0]


def bias_gradient(layer):
    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (X,)).pow(2).sum()

    return torch.func.grad(loss)({"bias": layer.bias.detach()})["bias"]


def counted(layer):
    with FlopCounterMode(display=False):
        return layer(X)


def subclassed(layer):
    kind = type("Kind", (torch.Tensor,), {})
    return layer(X.as_subclass(kind)).as_subclass(torch.Tensor)


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(X),
    "vmap over columns": lambda f: torch.vmap(f, in_dims=1)(X.T.contiguous()),
    "grad": lambda f: torch.func.grad(square(f))(X),
    "gradients of samples": lambda f: torch.vmap(torch.func.grad(square(f)))(X),
    "gradient of the bias": bias_gradient,
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,))[1],
    "jacfwd": lambda f: torch.func.jacfwd(f)(X[0]),
    "jacrev": lambda f: torch.func.jacrev(f)(X[0]),
    "hessian": lambda f: torch.func.hessian(square(f))(X[0]),
    "forward mode": forward_mode,
    "double backward": hessian_product,
    "checkpoint": lambda f: torch.utils.checkpoint.checkpoint(
        f, X.clone().requires_grad_(), use_reentrant=False
    ),
    "a mode": counted,
    "a subclass": subclassed,
}
TRACERS = {
    "jit.trace": lambda f, x: torch.jit.trace(f, x[:1], check_trace=False),
    "jit.trace without gradients": lambda f, x: torch.no_grad()(torch.jit.trace)(
        f, x[:1], check_trace=False
    ),
    "make_fx": lambda f, x: make_fx(f)(x),
    "torch.export": lambda f, x: torch.export.export(f, (x,)).module(),
}
every_way = pytest.mark.parametrize("make", [stored, resolved, trained])


@every_way
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_the_dense_layer_s_values(make, transform):
    layer = make()
    transform = TRANSFORMS[transform]
    torch.testing.assert_close(transform(layer), transform(dense(layer)), rtol=1e-4, atol=1e-4)


@every_way
@pytest.mark.parametrize("tracer", TRACERS)
def test_what_was_traced_computes_with_the_weight(make, tracer):
    layer = make()
    traced = TRACERS[tracer](layer, torch.ones(3, 16))
    torch.testing.assert_close(traced(X), dense(layer)(X), rtol=1e-4, atol=1e-4)


def test_symbolic_tracing_gives_the_values_of_a_fixed_weight_and_refuses_one_in_training():
    layer = resolved()
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    torch.testing.assert_close(traced(X), dense(layer)(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match=r"(?i)trace|Proxy"):
        torch.fx.symbolic_trace(nn.Sequential(trained()))


def test_export_to_onnx_says_what_to_export_instead(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ConfigError, match=r"hf_sparse\.export_dense\(model, folder\)"):
        resolved()(X)


def test_a_layer_in_float64_is_measured_by_no_kernel_for_narrower_inputs(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_MEASURE", "1")
    single = stored()
    layer = SparseLinear(Bitmask(), single.packed, (24, 16), torch.float64)
    layer.resolve()
    x = X.double()
    torch.testing.assert_close(layer(x), x @ single.sparse_weight.double().T)


class Routed(nn.Module):
    """Sparse experts, and a router that sends each token to two of them."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.router = experts, nn.Linear(16, experts.num_experts, bias=False)

    def forward(self, x):
        weights, chosen = torch.topk(self.router(x).softmax(-1), 2)
        return self.experts(x, chosen, weights)


@pytest.fixture
def routed():
    model = build(
        MixtralForCausalLM, MixtralConfig(**DECODER | {"hidden_size": 16, "num_local_experts": 4})
    )
    hf_sparse.prune(model, hf_sparse.SparseConfig(method="magnitude"))
    return Routed(model.model.layers[0].mlp.experts).eval()


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_trace_of_experts_does_not_keep_the_choice_of_its_sample(routed, tracer):
    sample = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    chosen = [torch.topk(routed.router(x), 2).indices.sort().values for x in (sample, X)]
    assert not torch.equal(*chosen)
    traced = TRACERS[tracer](routed, sample)
    torch.testing.assert_close(traced(X), routed(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vmap", "grad", "gradients of samples", "jvp", "jacrev"])
def test_a_transform_of_experts_gives_what_autograd_gives(routed, name):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))

    def loss(x):
        return routed(x[None] if x.dim() == 1 else x).pow(2).sum()

    found = {
        "vmap": lambda: torch.vmap(routed)(x[:, None])[:, 0],
        "grad": lambda: torch.func.grad(loss)(x),
        "gradients of samples": lambda: torch.vmap(torch.func.grad(loss))(x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1],
        "jacrev": lambda: torch.func.jacrev(loss)(x),
    }[name]()
    wanted = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(wanted), wanted)
    expected = {"vmap": routed(x), "jvp": gradient.sum()}.get(name, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
