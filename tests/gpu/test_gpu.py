"""What only a GPU shows: `python -m pytest -n 0 -m gpu tests/gpu`.

The property tests in tests/kernels/gpu/test_sliced_product.py and
tests/solvers/test_sparsegpt_triton.py run on a GPU by themselves where there is one.
"""

import copy
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from sparsegpt_loop import sparsegpt_loop
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import CompileConfig

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear
from hf_sparse.calibration.sums import StatisticsCollector
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.formats import Bitmask
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import Stored, dense
from hf_sparse.kernels.gpu import kernel, product, room, semi_structured, timing
from hf_sparse.solvers.sparsegpt import SparseGPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


HALF = Unstructured(0.5)


def pruned(shape, pattern=HALF, dtype=torch.bfloat16):
    weight = torch.randn(shape, device="cuda")
    return (weight * pattern.mask(weight.abs())).to(dtype)


def layer_of(weight, fmt=None):
    fmt = fmt or Bitmask()
    layer = SparseLinear(fmt, fmt.pack(weight), tuple(weight.shape), weight.dtype)
    layer.resolve()
    return layer


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (1000, 1004), (257, 14336)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_every_way_multiplies_large_weights(shape, sparsity, tokens):
    weight = pruned(shape, Unstructured(sparsity))
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    expected = x.double() @ weight.double().T
    packed = kernel.SlicedKernel.of(
        Stored(Bitmask(), Bitmask().pack(weight), shape, weight.dtype)
    ).product.weight
    for way in product.WAYS.values():
        found = way(x, packed)
        assert relative(found, expected) < 4e-3
        assert torch.equal(found, way(x, packed))  # the same every time
    grad = torch.randn(tokens, shape[0], device="cuda").bfloat16()
    found = product._decoded_transposed(grad, packed)
    assert relative(found, grad.double() @ weight.double()) < 1e-2


def test_a_layer_on_a_gpu_takes_the_sliced_kernel_and_says_so():
    layer = layer_of(pruned((512, 1024)))
    assert layer.kernel.name == "sliced"
    assert "sliced" in str(hf_sparse.explain(torch.nn.Sequential(layer)))
    assert layer.to("cpu").kernel.name in ("tile", "dense")
    assert layer.to("cuda").kernel.name == "sliced"


def test_2_4_weights_take_torch_s_form_and_come_back():
    weight = pruned((512, 1024), NM(2, 4))
    layer = layer_of(weight, NMPacked(2, 4))
    assert layer.kernel.name == "2:4"
    assert torch.equal(layer.weight, weight)
    for tokens in (1, 7, 128):
        x = torch.randn(tokens, 1024, device="cuda").bfloat16()
        assert relative(layer(x), x.double() @ weight.double().T) < 4e-3
    assert layer(x[:0]).shape == (0, 512)
    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(8, 512, device="cuda").double() @ weight.double()
    assert relative(x.grad, expected) < 1e-2


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_products_are_captured_in_cuda_graphs(pattern):
    weight = pruned((512, 1024), pattern)
    layer = layer_of(weight, NMPacked(2, 4) if isinstance(pattern, NM) else None)
    x = torch.randn(1, 1024, device="cuda").bfloat16()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert relative(y, x.double() @ weight.double().T) < 4e-3


@pytest.mark.filterwarnings("ignore")
def test_generation_compiles_with_a_static_cache_and_no_break():
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()  # fp32: compiled bf16 rounds elsewhere
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    prompt = torch.randint(512, (1, 16), device="cuda")
    arguments = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": -1}
    eager = model.generate(prompt, **arguments, max_new_tokens=8)
    arguments |= {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
    compiled = model.generate(prompt, **arguments, max_new_tokens=8)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, eager)


def test_dense_takes_over_only_where_there_is_room(monkeypatch):
    weight = pruned((256, 256))
    stored = Stored(Bitmask(), Bitmask().pack(weight), (256, 256), weight.dtype)
    monkeypatch.setenv("HF_SPARSE_MEASURE", "1")
    slow = {each.name: dict.fromkeys(each.ways, 0.5) for each in product.CLASSES}
    monkeypatch.setattr(timing, "over_dense", lambda *_: slow)
    monkeypatch.setattr(room, "FREE_SHARE", 0.0)
    assert kernel.SlicedKernel.consider(stored).kernel is None
    assert dense.DenseKernel.consider(stored).kernel is not None
    monkeypatch.setattr(room, "FREE_SHARE", 1.0)
    considered = kernel.SlicedKernel.consider(stored)
    assert considered.kernel is not None
    assert "stays packed" in considered.verdict.reason
    assert dense.DenseKernel.consider(stored).kernel is None


def test_what_was_measured_is_remembered_by_the_gpu_s_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SPARSE_MEASURE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer = layer_of(pruned((1024, 1024)))
    assert layer.trace[-1].kernel in ("sliced", "dense")
    known = (tmp_path / "hf_sparse" / "speed.json").read_text()
    assert torch.cuda.get_device_name() in known


def test_the_hessian_is_summed_without_tf32():
    inputs = torch.randn(4096, 512, device="cuda")  # TF32 would round them
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        collector = StatisticsCollector(512, Needs.HESSIAN, 1, torch.device("cuda"))
        collector.add(inputs)
        hessian = collector.finish().hessian
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    expected = inputs.double().T @ inputs.double() / len(inputs)
    assert relative(hessian, expected) < 1e-5


def test_2_4_products_agree_with_f_linear_in_both_half_types():
    for dtype in semi_structured.HALVES:
        weight = pruned((64, 128), NM(2, 4), dtype)
        x = torch.randn(9, 128, device="cuda", dtype=dtype)
        found = semi_structured.SemiStructuredWeight.of(weight)(x)
        torch.testing.assert_close(found, F.linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_layers_are_saved_from_a_gpu_by_way_of_the_cpu_and_copied_on_it(pattern):
    fmt = NMPacked(2, 4) if isinstance(pattern, NM) else Bitmask()
    weight = pruned((512, 1024), pattern)
    layer = layer_of(weight, fmt)
    state = layer.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert torch.equal(fmt.unpack(layer.packed, (512, 1024), weight.dtype), weight)
    before = torch.cuda.memory_allocated()
    copied = copy.deepcopy(layer)
    assert torch.cuda.memory_allocated() - before < 1.1 * layer.resident_bytes()
    x = torch.randn(3, 1024, device="cuda").bfloat16()
    assert torch.equal(copied(x), layer(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_layers_on_another_gpu_than_the_current_one_multiply(pattern):
    fmt = NMPacked(2, 4) if isinstance(pattern, NM) else Bitmask()
    weight = pruned((512, 1024), pattern).to("cuda:1")
    layer = layer_of(weight, fmt)
    for tokens in (1, 300):
        x = torch.randn(tokens, 1024, device="cuda:1").bfloat16()
        assert relative(layer(x), x.double() @ weight.double().T) < 4e-3
    with pytest.raises((ValueError, RuntimeError)):
        layer(x.to("cuda:0"))


@pytest.mark.benchmarks
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_sparsegpt_solves_as_well_as_its_loop_over_columns(pattern, capsys):
    weight = torch.randn(4096, 11008, device="cuda")
    inputs = torch.randn(4096, 11008, device="cuda") @ torch.randn(11008, 11008, device="cuda")
    hessian = inputs.T @ inputs / len(inputs)

    def ours():
        known = Statistics(1, weight[:1], hessian=hessian)
        return SparseGPT().solve(weight, known, pattern).weight

    errors, seconds = [], []
    for solve in (ours, lambda: sparsegpt_loop(weight, hessian, pattern)):
        change = solve() - weight  # compiles, too
        errors.append(float(((change @ hessian) * change).sum()))
        torch.cuda.synchronize()
        started = time.perf_counter()
        solve()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    with capsys.disabled():
        sys.stdout.write(f"\n{pattern}: {seconds[0]:.3f} s, the loop {seconds[1]:.3f} s\n")


@pytest.mark.parametrize("trains", [False, True])
def test_sparse_attention_is_that_of_a_cpu(trains):
    config = LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(64, (2, 300))
    settings = {"method": "hs_block", "keys": 64, "from_length": 0}
    hf_sparse.use_attention(model, settings)
    other = copy.deepcopy(model).cuda()
    with torch.set_grad_enabled(trains):
        expected, found = model(ids).logits, other(ids.cuda()).logits
    assert relative(found.cpu(), expected) < 1e-3
    if trains:
        found.square().mean().backward()
        assert other.model.embed_tokens.weight.grad.isfinite().all()
