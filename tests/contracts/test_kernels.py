"""What every registered kernel promises; a new one is tested by being registered."""

import copy
import pickle

import pytest
import torch
from cases import in_one_test
from torch import nn

import hf_sparse
from hf_sparse.core.errors import ConfigError, RegistrationError
from hf_sparse.core.grids import Grid
from hf_sparse.core.patterns import NM
from hf_sparse.formats import Bitmask, Quantized
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import KERNELS, Considered, Kernel, Stored, Verdict, choose
from hf_sparse.kernels.cpu.integer.kernel import IntegerKernel
from hf_sparse.kernels.gpu import product as gpu_product
from hf_sparse.kernels.gpu.kernel import SlicedKernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 40), (33, 36)]
MARGIN = 0.1, 4096  # of the dense weight's bytes, and bytes, for what describes a weight


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(kind: str, shape=(33, 36)) -> Stored:
    """A weight as the files keep it; floating-point ones leave every third input out.

    Kernels may round the inputs of "rounded" ones; "whole" ones have no zeros; of "skipped" ones
    half of the inputs are said to be 0.
    """
    rows, columns = shape
    weight = normal(rows, columns, seed=rows)
    if kind.startswith("codes"):
        bits, size, sym = {"codes8": (8, None, True), "codes4": (4, 16, False)}[kind[:6]]
        grid = Grid(bits, size, sym)
        if "whole" not in kind:
            weight *= normal(rows, columns, seed=1) > 0
        fmt, dtype = Quantized(grid, Bitmask()), torch.bfloat16
        stored = fmt.pack(grid.fit(weight, weight != 0).round(weight))
    else:
        layout, dtype = kind.removesuffix(", skipped").split(" ")
        fmt, dtype = Bitmask() if layout == "bitmask" else NMPacked(2, 4), getattr(torch, dtype)
        kept = NM(2, 4).mask(weight.abs()) if layout == "2:4" else normal(*shape, seed=1) > 0
        weight = (weight * kept).to(dtype)
        if layout == "bitmask":
            weight[:, ::3] = 0
        stored = fmt.pack(weight)
    tensors = {key: tensor.to(DEVICE) for key, tensor in stored.items()}
    zeros = 0.5 if "skipped" in kind else 0.0
    return Stored(fmt, tensors, shape, dtype, "any", "int8" if "rounded" in kind else None, zeros)


KINDS = [
    *(f"bitmask {str(dtype).removeprefix('torch.')}" for dtype in FLOATS),
    "2:4 float32",
    "2:4 bfloat16",
    "2:4 bfloat16, skipped",
    "bitmask float32, skipped",
    "codes8",
    "codes4",
    "codes8 rounded",
    "codes4 rounded",
    "codes8 whole, rounded",
]


def made(name: str, stored: Stored) -> Considered:
    """What comes of a weight; `sliced` is made on a CPU too, for Triton's interpreter."""
    if name == SlicedKernel.name and DEVICE == "cpu":
        return Considered(Verdict(name, True, "interpreted"), SlicedKernel.of(stored))
    return KERNELS[name].consider(stored)


def cases() -> list:
    """Each kernel with each kind of weight that it takes, or with the reason why it takes none."""
    found, weights = [], {kind: store(kind) for kind in KINDS}
    for name in KERNELS:
        verdicts = {kind: made(name, stored) for kind, stored in weights.items()}
        taken = [kind for kind, considered in verdicts.items() if considered.kernel is not None]
        if name != IntegerKernel.name:  # the others round nothing
            taken = [kind for kind in taken if "rounded" not in kind]
        found += [pytest.param(name, kind, id=f"{name}-{kind}") for kind in taken]
        if not taken:
            reasons = "; ".join(dict.fromkeys(c.verdict.reason for c in verdicts.values()))
            skip = pytest.mark.skip(reason=f"{name} takes nothing here: {reasons}")
            found.append(pytest.param(name, None, id=name, marks=skip))
    return found


CASES = cases()
every_kernel = pytest.mark.parametrize(("name", "kind"), CASES)
one_kind = pytest.mark.parametrize(
    ("name", "kind"), list({case.values[0]: case for case in reversed(CASES)}.values())[::-1]
)
every_shape = in_one_test(shape=SHAPES)


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels multiply on a CPU as they do on a GPU."""
    if DEVICE == "cpu":
        pytest.importorskip("triton")
        on_gpu = lambda x: x.dtype in FLOATS  # noqa: E731
        monkeypatch.setattr(gpu_product, "_runs_triton", on_gpu)


def kernel_of(name, stored) -> Kernel:
    kernel = made(name, stored).kernel
    if kernel is None:
        pytest.skip(f"{name} takes this kind in other shapes")
    return kernel


def assert_close(y, x, stored, bias=None):
    """Within two roundings to y's dtype (a product and a bias), and those of fp32 sums.

    Rounded inputs are off by half a step, of which 127 make the largest. The weight may be rounded
    too, to x's dtype, and codes times scales to the layer's.
    """
    weight = stored.dense(torch.float64)
    expected = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    bias = torch.zeros(()).double() if bias is None else bias.double()
    rounding = torch.finfo(y.dtype).eps * (expected.abs() + bias.abs())
    sums = 2.0**-23 * (2 + weight.shape[1] ** 0.5) * size
    coded = isinstance(stored.format, Quantized)
    coarsest = max(torch.finfo(dtype).eps for dtype in (y.dtype, stored.dtype))
    if coded or coarsest > torch.finfo(stored.values_dtype).eps:
        sums += coarsest / 2 * size
    if stored.activations == "int8":
        step = x.double().abs().amax(dim=-1, keepdim=True) / 127
        sums += 1.001 * step / 2 * weight.abs().sum(dim=1)
    least = 2 * torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    error = (y.double() - (expected + bias)).abs()
    assert y.shape == expected.shape
    assert bool((error <= rounding + sums + least).all()), float((error - rounding - sums).max())


def inputs(columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = normal(6, columns, seed=5).to(DEVICE, dtype)
    wide = normal(6, 3 * columns, seed=6).to(DEVICE, dtype)
    return {
        "several": x,
        "one": x[:1],
        "no batch": x[0],
        "three dimensions": x.view(2, 3, columns),
        "empty": x[:0],
        "empty batch": x.view(2, 3, columns)[:, :0],
        "rows apart": x[::2],
        "columns apart": wide[:, ::3],
        "part of a row": wide[:, columns : 2 * columns],
        "transposed": x.T.contiguous().T,
        "expanded": x[:1].expand(4, columns),
        "overlapping": wide.view(-1).as_strided((5, columns), (1, 1)),
        "negated": torch._neg_view(x),
        "many": normal(40, columns, seed=7).to(DEVICE, dtype),
    }


# --- right ----------------------------------------------------------------------------------


@every_kernel
@every_shape
def test_products_agree_with_float64_over_shapes(name, kind, shape, interpreted):
    if kind.startswith("2:4") and shape[1] % 4:
        pytest.skip("2:4 of whole groups")
    stored = store(kind, shape)
    kernel = kernel_of(name, stored)
    x, bias = (normal(*size, seed=3).to(DEVICE) for size in ((3, shape[1]), (shape[0],)))
    for own_bias in (None, bias):
        assert_close(kernel.linear(x, own_bias), x, stored, own_bias)


@every_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_agree_with_float64_however_x_lies(name, kind, dtype):
    stored = store(kind)
    kernel = kernel_of(name, stored)
    for lies, x in inputs(36, dtype).items():
        before = x.clone()
        y = kernel.linear(x, None)
        assert y.dtype == dtype, lies
        assert_close(y, x, stored)
        assert torch.equal(x, before), lies


@every_kernel
def test_gradients_of_the_input_and_the_bias_are_the_dense_layer_s(name, kind):
    stored = store(kind)
    kernel = kernel_of(name, stored)
    x, bias = (normal(*size, seed=3).to(DEVICE).requires_grad_() for size in ((5, 36), (33,)))
    upstream = normal(5, 33, seed=4).to(DEVICE)
    (kernel.linear(x, bias) * upstream).sum().backward()
    weight = stored.dense(torch.float64)
    rounding = torch.finfo(stored.dtype).eps / 2 * (upstream.double().abs() @ weight.abs())
    error = (x.grad.double() - upstream.double() @ weight).abs()
    assert bool((error <= rounding + 1e-5).all())
    torch.testing.assert_close(bias.grad, upstream.sum(dim=0))


@one_kind
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_a_product_compiles_as_one_graph(name, kind, grad):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = kernel_of(name, store(kind))

        def forward(self, x):
            return self.kernel.linear(x, None)

    layer, x = Layer(), normal(4, 36, seed=3).to(DEVICE).requires_grad_(grad)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@one_kind
def test_a_width_that_does_not_fit_is_refused(name, kind):
    kernel = kernel_of(name, store(kind))
    with pytest.raises((ValueError, RuntimeError)):
        kernel.linear(normal(2, 35).to(DEVICE), None)


# --- what is held ---------------------------------------------------------------------------


@every_kernel
@every_shape
def test_the_stored_weight_comes_back(name, kind, shape):
    if kind.startswith("2:4") and shape[1] % 4:
        pytest.skip("2:4 of whole groups")
    stored = store(kind, shape)
    kernel = kernel_of(name, stored)
    assert torch.equal(kernel.weight(stored.dtype), stored.dense(stored.dtype))
    packed = kernel.packed(stored.format, stored.dtype)
    assert set(packed) == set(stored.tensors)
    assert all(torch.equal(packed[key], tensor) for key, tensor in stored.tensors.items())


@every_kernel
def test_nothing_is_written_to(name, kind):
    stored = store(kind)
    before = {key: tensor.clone() for key, tensor in stored.tensors.items()}
    kernel = kernel_of(name, stored)
    held = {key: tensor.clone() for key, tensor in kernel.tensors().items()}
    x, bias = normal(2, 36).to(DEVICE), normal(33).to(DEVICE)
    copies = x.clone(), bias.clone()
    kernel.linear(x, bias).zero_()
    kernel.weight(torch.float32).zero_()
    kernel.packed(stored.format, stored.dtype)
    assert all(torch.equal(stored.tensors[key], before[key]) for key in before)
    assert all(torch.equal(kernel.tensors()[key], held[key]) for key in held)
    assert torch.equal(x, copies[0])
    assert torch.equal(bias, copies[1])


@every_kernel
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_copies_stand_for_themselves(name, kind, copy_of):
    kernel = kernel_of(name, store(kind))
    copied, x = copy_of(kernel), normal(2, 36).to(DEVICE)
    expected = kernel.linear(x, None)
    own, other = kernel.tensors(), copied.tensors()
    assert set(own) == set(other)
    for key, tensor in own.items():
        assert torch.equal(tensor, other[key])
        assert tensor.data_ptr() != other[key].data_ptr() or not tensor.numel()
    del kernel, own
    assert torch.equal(copied.linear(x, None), expected)


@every_kernel
def test_no_more_memory_is_held_than_the_dense_weight_takes(name, kind):
    if name == "dense":
        pytest.skip("holds the dense weight, and codes beside it")
    stored = store(kind, (256, 512))
    held = kernel_of(name, stored).tensors().values()
    share, more = MARGIN
    dense = 256 * 512 * stored.dtype.itemsize
    assert sum(tensor.nbytes for tensor in held) <= (1 + share) * dense + more


# --- what is said, and registered -----------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_says_what_came_of_a_weight(name, kind):
    considered = KERNELS[name].consider(store(kind))
    assert considered.verdict.kernel == name
    assert considered.verdict.accepted == (considered.kernel is not None)
    assert considered.verdict.reason
    assert considered.kernel is None or considered.kernel.name == name


def kernel_class(name="mine", considered=None):
    """A kernel that gives weights the verdict of its name, or what is passed."""
    methods = dict.fromkeys(("tensors", "linear", "weight", "packed"), lambda self, *_: None)
    refused = Considered(Verdict(name, False, "no")) if considered is None else considered
    methods["consider"] = classmethod(lambda cls, stored: refused)
    return type("Mine", (Kernel,), {"name": name, **methods})


@pytest.fixture
def no_traces(monkeypatch):
    monkeypatch.setattr(KERNELS, "_classes", dict(KERNELS))


def test_a_registered_kernel_is_considered_where_it_was_said(no_traces):
    known = list(KERNELS)
    hf_sparse.register_kernel(kernel_class("first"))
    hf_sparse.register_kernel(kernel_class("late"), before="dense")
    assert list(KERNELS) == ["first", *known[:-1], "late", known[-1]]
    trace = choose(store("bitmask float32")).trace
    assert (trace[0].kernel, trace[0].reason) == ("first", "no")


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (kernel_class("dense"), "kernel 'dense' exists already"),
        (kernel_class("reference"), "'reference' means something else"),
        (kernel_class(""), "letters"),
        (
            type("Half", (Kernel,), {"name": "half"}),
            "lacks consider, linear, packed, tensors, weight",
        ),
        (nn.Linear, "no subclass of Kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kernel_that_could_not_work_is_refused(no_traces, cls, words):
    with pytest.raises(RegistrationError, match=words):
        hf_sparse.register_kernel(cls)
    with pytest.raises(ConfigError, match=r"kernel='dens' does not exist; did you mean 'dense'"):
        hf_sparse.register_kernel(kernel_class(), before="dens")


def test_a_kernel_that_does_not_say_what_came_of_a_weight_is_named(no_traces):
    hf_sparse.register_kernel(kernel_class(considered="yes"))
    with pytest.raises(RegistrationError, match=r"Mine\.consider gave str: return a Considered"):
        choose(store("bitmask float32"))
