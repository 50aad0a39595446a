"""The dense head of a sparse model: a native product of one token, and still an `nn.Linear`."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.kernels import gemv, native, speed
from hf_sparse.layers.head import HeadLinear, restore_head, speed_up_head

HALVES = [torch.bfloat16, torch.float16]
# Half a unit in the last place of the output, and what fp32 sums lose on top.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(y, x, weight):
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    allowed = 1.01 * ROUNDING[y.dtype] * expected.abs() + 2.0**-22 * size
    assert bool(((y.double() - expected).abs() <= allowed).all())


@pytest.fixture
def faster(monkeypatch):
    """Every head measures as twice as fast."""
    monkeypatch.setattr(gemv, "over_dense", lambda weight: 2.0)


def head_of(rows=70, columns=36, bias=True, dtype=torch.bfloat16):
    head = nn.Linear(columns, rows, bias=bias).to(dtype)
    with torch.no_grad():
        head.weight.copy_(normal(rows, columns))
    head.__class__ = HeadLinear
    head.speedup = 2.0
    return head


@pytest.mark.parametrize("path", native.paths())
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x_dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 64), (4, 200), (33, 131), (130, 300)])
def test_one_token_agrees_with_float64_on_every_path(path, dtype, x_dtype, shape):
    weight, x = normal(*shape).to(dtype), normal(1, shape[1], seed=1).to(x_dtype)
    assert_close(native.gemv(x, weight, path=path), x, weight)
    wide = normal(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]]  # rows that lie apart
    assert_close(native.gemv(x, wide, path=path), x, wide)


@pytest.mark.parametrize("path", native.paths())
def test_infinities_and_nans_come_out_as_of_linear(path):
    x = normal(1, 40).bfloat16()
    weight = normal(4, 40).bfloat16()
    weight[0, 3], weight[1, 39], weight[2, 5] = torch.nan, torch.inf, 0
    x[0, 5] = torch.inf
    y, expected = native.gemv(x, weight, path=path), F.linear(x, weight)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_threads_do_not_change_a_bit():
    weight, x = normal(3001, 200).bfloat16(), normal(1, 200).bfloat16()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native.gemv(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_arguments_are_named():
    weight, x = normal(4, 8).bfloat16(), normal(1, 8).bfloat16()
    with pytest.raises(TypeError, match=r"weight is torch\.float32"):
        native.gemv(x, weight.float())
    with pytest.raises(ValueError, match="one row of 8"):
        native.gemv(normal(2, 8).bfloat16(), weight)
    with pytest.raises(ValueError, match="contiguous rows"):
        native.gemv(normal(1, 4).bfloat16(), weight.T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_keeps_torch_s_rules_and_has_gradients():
    x, weight = (t.bfloat16().requires_grad_() for t in (normal(1, 36), normal(20, 36)))
    torch.library.opcheck(gemv.gemv, (x, weight))
    upstream = normal(1, 20).bfloat16()
    (gemv.gemv(x, weight) * upstream).sum().backward()
    other, dense = (t.detach().double().requires_grad_() for t in (x, weight))
    (F.linear(other, dense) * upstream.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad.double(), dense.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(36,), (1, 36), (1, 1, 36)])
def test_a_head_takes_one_token_of_its_dtype_natively_and_the_rest_as_before(monkeypatch, shape):
    calls = []
    monkeypatch.setattr(native, "gemv", lambda x, w: calls.append(1) or F.linear(x, w))
    head = head_of()
    head(normal(*shape).bfloat16())
    assert len(calls) == 1
    head(normal(2, 36).bfloat16())
    head(normal(0, 36).bfloat16())
    head.float()(normal(1, 36))
    assert len(calls) == 1


def test_a_head_gives_what_a_linear_layer_gives():
    head = head_of()
    x = normal(1, 36).bfloat16()
    expected = F.linear(x.double(), head.weight.double(), head.bias.double())
    torch.testing.assert_close(head(x).double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_head_compiles_and_exports():
    head = head_of().requires_grad_(False)
    x = normal(1, 36).bfloat16()
    expected = head(x)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(head, (x,))
    assert torch.equal(exported.module()(x), expected)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    many = torch.export.export(head, (x.expand(3, -1),), dynamic_shapes=({0: tokens},))
    assert many.module()(x.expand(5, -1)).shape == (5, 70)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_heads_of_their_own(copy_of):
    head = head_of()
    other = copy_of(head)
    assert type(other) is HeadLinear
    assert set(other.state_dict()) == {"weight", "bias"}
    with torch.no_grad():
        other.weight.zero_()
    assert bool(head.weight.any())


def sparse_model(tiny, dtype=torch.bfloat16):
    model = tiny.to(dtype)
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    return model


def test_a_sparse_model_s_head_is_sped_up_where_that_measures_faster(faster, tiny, tmp_path):
    model = sparse_model(tiny)
    assert type(model.lm_head) is HeadLinear
    assert isinstance(model.lm_head, nn.Linear)
    assert "dense head lm_head: native at one token, 2.00" in str(hf_sparse.explain(model))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(ids, logits_to_keep=1).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is HeadLinear
    with torch.no_grad():
        assert torch.equal(loaded(ids, logits_to_keep=1).logits, logits)
    assert type(loaded.dequantize().lm_head) is nn.Linear


def test_a_tied_head_stays_tied_and_trains(faster, tiny):
    config = copy.deepcopy(tiny.config)
    config.tie_word_embeddings = True
    model = sparse_model(LlamaForCausalLM(config))
    assert type(model.lm_head) is HeadLinear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_output_embeddings() is model.lm_head
    model(torch.tensor([[5]]), labels=None).logits.float().square().sum().backward()
    assert bool(model.lm_head.weight.grad.any())


def test_other_heads_are_left_alone(monkeypatch, tiny):
    for dtype, speedup in (
        (torch.float32, 2.0),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, None),
    ):
        monkeypatch.setattr(gemv, "over_dense", lambda weight, speedup=speedup: speedup)
        model = copy.deepcopy(tiny).to(dtype)
        speed_up_head(model)
        assert type(model.lm_head) is nn.Linear
    speed_up_head(nn.Linear(3, 4))  # a model without a head


def test_it_is_undone(faster, tiny):
    model = tiny.bfloat16()
    speed_up_head(model)
    assert type(model.lm_head) is HeadLinear
    restore_head(model)
    assert type(model.lm_head) is nn.Linear
    assert not hasattr(model.lm_head, "speedup")


def test_the_measurement_is_kept_and_can_be_switched_off(monkeypatch, tmp_path):
    weight = normal(64, 32).bfloat16()
    assert gemv.over_dense(weight) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(speed.SWITCH, "1")
    first = gemv.over_dense(weight)
    assert first > 0
    monkeypatch.setattr(gemv, "_measure", lambda x, w: pytest.fail("it was measured before"))
    assert gemv.over_dense(weight) == first
    monkeypatch.setattr(native, "_load", lambda: "no library")
    assert gemv.over_dense(weight) is None
