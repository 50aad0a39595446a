"""A previewed head: exact scores of the candidates, and of all where more is asked for."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_bert, tiny_llama
from torch import nn
from transformers import BertModel

import hf_sparse
from hf_sparse.core.errors import ConfigError
from hf_sparse.kernels.cpu import library
from hf_sparse.layers.head import HeadLinear
from hf_sparse.layers.head_preview import PreviewedHead, preview_head

IDS = torch.tensor([[1, 5, 9]])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Model(nn.Module):
    """A head alone."""

    def __init__(self, vocabulary=500, columns=72, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(columns, vocabulary, bias=bias, dtype=dtype)

    def get_output_embeddings(self):
        return self.head


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", library.FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(72,), (1, 72), (1, 1, 72)])
def test_candidates_have_exact_scores_and_no_other_token_passes_them(dtype, bias, shape):
    model = Model(bias=bias, dtype=dtype)
    x = inputs(*shape, dtype=dtype)
    exact = F.linear(x, model.head.weight, model.head.bias)
    preview_head(model, 40)
    scores = model.head(x)
    assert (scores.shape, scores.dtype) == (exact.shape, dtype)
    best = exact.view(-1).topk(5).indices
    torch.testing.assert_close(scores.view(-1)[best], exact.view(-1)[best])
    near = (scores - exact).abs().view(-1) <= 4 * torch.finfo(dtype).eps
    assert int(near.sum()) >= 40
    assert int((scores >= scores.view(-1).topk(40).values[-1]).sum()) >= 40
    assert torch.equal(scores.view(-1).topk(5).indices, best)
    assert (scores - exact).abs().max() < 0.3  # the others are near, for sampling


def test_the_scores_of_other_tokens_are_lowered_to_the_lowest_candidate():
    model = Model(64, 64, bias=False)
    model.head.weight.zero_()
    model.head.weight[:, 0] = torch.linspace(0.5, 1, 64)  # in 4 bits many are alike
    model.head.weight[:, 1] = 1.0
    preview_head(model, 4)
    x = torch.zeros(64)
    x[0] = 1.0
    scores = model.head(x)
    exact = F.linear(x, model.head.weight)
    candidates = scores == exact
    assert scores.max() == scores[candidates].max()
    assert (scores <= scores[candidates].max()).all()
    assert scores.sort().values[-5] <= scores.topk(4).values.min()


def test_greedy_decoding_gives_the_same_tokens():
    model = tiny_llama()
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    before = model.generate(IDS, **settings)
    hf_sparse.preview_head(model, candidates=30)
    calls = []
    scores = type(model.lm_head.preview).scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.lm_head.preview),
            "scores",
            lambda *args: calls.append(1) or scores(*args),
        )
        assert torch.equal(model.generate(IDS, **settings), before)
    assert len(calls) == 20
    assert "30 candidates" in hf_sparse.explain(model).head


def test_several_tokens_gradients_and_tracers_get_exact_scores():
    model = Model()
    head = model.head
    x, many = inputs(1, 72), inputs(2, 72)
    exact, exact_many = head(x), head(many)
    preview_head(model, 8)
    assert not torch.equal(head(x), exact)
    assert torch.equal(head(many), exact_many)
    with torch.enable_grad():
        y = head(x)
        assert torch.equal(y, exact)
        y.sum().backward()
        torch.testing.assert_close(head.weight.grad, x.expand(500, 72))
    torch.testing.assert_close(torch.func.vmap(head)(many), exact_many)
    exported = torch.export.export(head, (x,)).module()
    torch.testing.assert_close(exported(x), exact)


def test_a_weight_that_was_written_to_is_multiplied_exactly_with_a_warning(caplog):
    from transformers.utils import logging

    model = Model()
    preview_head(model, 8)
    model.head.load_state_dict({k: 2 * v for k, v in model.head.state_dict().items()})
    x = inputs(1, 72)
    logging.enable_propagation()
    try:
        assert torch.equal(model.head(x), F.linear(x, model.head.weight, model.head.bias))
    finally:
        logging.disable_propagation()
    assert "preview_head once more" in caplog.text
    preview_head(model, 8)
    assert not torch.equal(model.head(x), F.linear(x, model.head.weight, model.head.bias))


@pytest.mark.parametrize("dtype", library.FLOATS, ids=str)
def test_a_write_that_torch_does_not_count_is_noticed(dtype):
    model, x = Model(dtype=dtype), inputs(1, 72, dtype=dtype)
    preview_head(model, 8)
    model.head.weight.data += 0.1 * torch.randn(500, 72).to(dtype)  # as PEFT merges
    assert torch.equal(model.head(x), F.linear(x, model.head.weight, model.head.bias))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("merged", [False, True])
def test_a_head_with_an_adapter_has_exact_scores(merged):
    model = tiny_llama()
    preview_head(model, 4)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    if merged:
        adapted.merge_adapter()
    head, x = model.lm_head, inputs(1, 1, model.config.hidden_size)
    change = head.lora_B.default.weight @ head.lora_A.default.weight * head.scaling["default"]
    weight = head.base_layer.weight + (0 if merged else change)
    torch.testing.assert_close(head(x), F.linear(x, weight))
    if merged:
        adapted.unmerge_adapter()
    preview_head(adapted.merge_and_unload(), 4)
    assert type(model.lm_head) is PreviewedHead


def test_copies_have_a_preview_of_their_own():
    model = Model()
    preview_head(model, 8)
    x = inputs(1, 72)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.head(x), model.head(x))
        assert other.head.preview.is_of(other.head.weight)


@pytest.mark.parametrize("cls", [nn.Linear, HeadLinear])
def test_none_gives_back_the_head_that_was(cls):
    model = Model()
    model.head.__class__ = cls
    names = set(model.head.__dict__)
    preview_head(model, 8)
    assert type(model.head) is PreviewedHead
    preview_head(model, None)
    assert type(model.head) is cls
    assert set(model.head.__dict__) == names


@pytest.mark.parametrize("candidates", [0, -1, 500, 8.0, "8", True])
def test_a_number_of_candidates_that_is_none_is_an_error(candidates):
    with pytest.raises(ConfigError, match="candidates="):
        preview_head(Model(), candidates)


def test_a_call_that_is_refused_leaves_the_preview_that_was():
    model = Model()
    preview_head(model, 8)
    with pytest.raises(ConfigError, match="candidates=0"):
        preview_head(model, 0)
    assert model.head.preview.candidates == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_with_values_that_are_no_numbers_is_an_error(value):
    model = Model()
    model.head.weight[3, 4] = value
    with pytest.raises(ConfigError, match="NaN or infinite"):
        preview_head(model)


def test_autocast_and_traces_get_exact_scores_of_all(recwarn):
    model, x = Model(), inputs(1, 72)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.head(x)
        preview_head(model, 8)
        assert torch.equal(model.head(x), half)
    assert half.dtype == torch.bfloat16
    recwarn.clear()
    traced = torch.jit.trace(model.head, x, check_trace=False)
    assert not [w for w in recwarn if w.category is torch.jit.TracerWarning]
    other = 2 * x
    torch.testing.assert_close(traced(other), F.linear(other, model.head.weight, model.head.bias))


def test_a_model_without_a_linear_head_is_an_error():
    with pytest.raises(ConfigError, match="no output head"):
        preview_head(nn.Linear(3, 4))
    with pytest.raises(ConfigError, match="no output head"):
        preview_head(tiny_bert(BertModel))
    model = Model()
    model.head = nn.Identity()
    with pytest.raises(ConfigError, match="a Identity as its output head"):
        preview_head(model)


def test_a_machine_that_cannot_multiply_bytes_is_an_error(monkeypatch):
    monkeypatch.setattr(library, "integer_path", lambda: "scalar")
    with pytest.raises(ConfigError, match="can't be previewed"):
        preview_head(Model())
