"""Dense and sparse side by side: what is measured, and when each model is in memory."""

import gc
import sys
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse import EvaluationError, SparseConfig


@pytest.fixture
def pair(tiny):
    """A dense model and its pruned copy."""
    sparse = LlamaForCausalLM(tiny.config).eval()
    sparse.load_state_dict(tiny.state_dict())
    hf_sparse.prune(sparse, SparseConfig(method="magnitude", sparsity=0.8))
    return tiny, sparse


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]], dtype=torch.long)}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids)


def test_the_error_of_hidden_states_over_depth_is_that_of_a_float64_loop(pair, token_ids):
    dense, sparse = pair
    samples = [list(row[:n]) for row, n in zip(token_ids, (16, 9, 12), strict=False)]
    found = hf_sparse.agreement(sparse, dense, None, samples, batch_size=2, depth=True)
    totals = [[0.0, 0.0] for _ in range(3)]
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor([[int(i) for i in sample]])
            ours = sparse(ids, output_hidden_states=True).hidden_states
            theirs = dense(ids, output_hidden_states=True).hidden_states
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                totals[i][0] += float((a.double() - b.double()).square().sum())
                totals[i][1] += float(b.double().square().sum())
    expected = [(d / r) ** 0.5 for d, r in totals]
    assert found.depth == pytest.approx(expected, rel=1e-4)
    assert found.depth[0] == 0.0
    assert hf_sparse.agreement(sparse, dense, None, samples).depth == ()


def test_everything_is_measured_of_both_and_texts_are_the_models_own(pair, token_ids):
    dense, sparse = pair
    samples = list(token_ids[:4])
    found = hf_sparse.evaluate(
        sparse, dense, Words(), samples, speed=False, prompts=["5 6 7", "9"], new_tokens=6
    )
    assert found.perplexity == hf_sparse.perplexity(sparse, None, samples)
    assert found.dense_perplexity == hf_sparse.perplexity(dense, None, samples)
    assert found.agreement == hf_sparse.agreement(sparse, dense, None, samples, depth=True)
    assert found.speed is found.dense_speed is None
    assert [texts.prompt for texts in found.texts] == ["5 6 7", "9"]
    for texts in found.texts:
        for model, text in ((dense, texts.dense), (sparse, texts.sparse)):
            ids = [int(word) for word in texts.prompt.split()]
            for _ in range(6):  # one token after the other, without a cache
                with torch.no_grad():
                    following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(following)
                if following == model.config.eos_token_id:
                    break
            assert text.split() == [str(i) for i in ids[len(texts.prompt.split()) :]]
    assert set(found.to_dict()) == {"perplexity", "dense_perplexity", "agreement", "texts"}


def test_prompts_come_from_the_data_and_a_sparse_model_may_be_alone(pair, token_ids):
    _, sparse = pair
    found = hf_sparse.evaluate(sparse, None, Words(), list(token_ids), speed=False, new_tokens=2)
    assert len(found.texts) == 3
    used = {" ".join(map(str, row.tolist())) for row in token_ids}
    assert all(texts.prompt in used and texts.dense is None for texts in found.texts)
    assert found.agreement is None


def test_each_model_is_timed_while_the_other_one_is_not_there(monkeypatch):
    alive: list[weakref.ref] = []
    seen = []

    def load():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes, **heads))
        model.cycle = [model]  # as a pruned one has
        alive.append(weakref.ref(model))
        return model

    def timed(model):
        seen.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(sys.modules["hf_sparse.evaluation.evaluate"], "generation_speed", timed)
    ids = [torch.arange(3, 12)]
    gc.disable()  # no luck
    try:
        found = hf_sparse.evaluate(load, load, None, ids)
    finally:
        gc.enable()
    assert seen == [1, 1]
    assert len(alive) == 3
    assert found.agreement.top1 == 1.0


def test_one_string_is_no_list_of_prompts_and_empty_ones_have_no_tokens(pair):
    with pytest.raises(EvaluationError, match=r"is one string: pass a list"):
        hf_sparse.evaluate(pair[1], prompts="SQLite")
    with pytest.raises(EvaluationError, match=r"'' has no tokens"):
        hf_sparse.evaluate(pair[1], None, Words(), prompts=[""], speed=False)
