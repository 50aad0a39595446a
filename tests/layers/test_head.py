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
from hf_sparse.kernels.cpu import dense_row
from hf_sparse.layers.head import HeadLinear, restore_head, speed_up_head


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def faster(monkeypatch):
    """Every head measures as twice as fast."""
    monkeypatch.setattr(dense_row, "over_dense", lambda weight: 2.0)


def head_of(rows=70, columns=36, bias=True, dtype=torch.bfloat16):
    head = nn.Linear(columns, rows, bias=bias).to(dtype)
    with torch.no_grad():
        head.weight.copy_(normal(rows, columns))
    head.__class__ = HeadLinear
    head.speedup = 2.0
    return head


@pytest.mark.parametrize("shape", [(36,), (1, 36), (1, 1, 36)])
def test_a_head_takes_one_token_of_its_dtype_natively_and_the_rest_as_before(monkeypatch, shape):
    calls = []
    monkeypatch.setattr(dense_row, "product", lambda x, w: calls.append(1) or F.linear(x, w))
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


def test_a_head_within_autocast_is_in_its_dtype():
    head, x = head_of(), normal(1, 36).bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert head(x).dtype == F.linear(x, head.weight).dtype == torch.float16


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
        monkeypatch.setattr(dense_row, "over_dense", lambda weight, speedup=speedup: speedup)
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
