"""What a model's attention is like."""

import dataclasses
import json

import pytest
import torch
from attention_models import make
from transformers import BloomConfig, BloomForCausalLM

import hf_sparse
from hf_sparse import ConfigError, Evaluation, EvaluationError

IDS = [torch.randint(3, 50, (64,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
SMALL = {"keys": 16, "block": 8, "key_block": 4}


@pytest.fixture(scope="module")
def model():
    return make("llama")


def diagnose(model, **changes):
    options = {"attention": SMALL, "queries": 16, "rank": 4, "num_samples": 2} | changes
    return hf_sparse.diagnose_attention(model, None, IDS, 64, **options)


def test_shares_are_those_of_the_attention_weights(model):
    found = diagnose(model, methods=["hs_block"])
    eager = make("llama")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack([eager(ids[None], output_attentions=True).attentions[1][0]
                               for ids in IDS])  # fmt: skip
    places = torch.linspace(32, 63, 16).long()
    rows = weights[:, :, places]
    top = rows.sort(descending=True).values[..., :16].sum(dim=-1).mean(dim=(0, 2))
    window = torch.stack([rows[:, :, i, t - 15 : t + 1].sum(dim=-1) for i, t in enumerate(places)])
    squares = torch.linalg.svdvals(rows).square()
    low_rank = (squares[..., :4].sum(dim=-1) / squares.sum(dim=-1)).mean(dim=0)
    heads = [head for head in found.heads if head.layer == "model.layers.1.self_attn"]
    assert [head.head for head in heads] == [0, 1, 2, 3]
    for head in heads:
        assert head.top == pytest.approx(float(top[head.head]), abs=1e-5)
        assert head.window == pytest.approx(float(window.mean(dim=(0, 1))[head.head]), abs=1e-5)
        assert head.low_rank == pytest.approx(float(low_rank[head.head]), abs=1e-4)


def test_more_keys_leave_less_error_and_all_of_them_none(model):
    errors = [
        dict(diagnose(model, attention=SMALL | {"keys": keys}, methods=["hs_block"]).layers)
        for keys in (16, 32, 64)
    ]
    sizes = [sum(row["hs_block"] for row in found.values()) for found in errors]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] == pytest.approx(0, abs=1e-4)


def test_it_is_printed_saved_and_shown_and_the_model_stays_as_it_was(model, tmp_path):
    before = model.config._attn_implementation
    found = diagnose(model)
    assert model.config._attn_implementation == before
    assert set(found.heads[0].errors) == {
        "hs_block", "hs_smyrf", "hs_routing", "hs_mongoose", "hs_performer", "hs_scatterbrain",
    }  # fmt: skip
    assert "hs_scatterbrain" in str(found)
    assert "model.layers.1.self_attn" in str(found)
    values = Evaluation(attention=found).to_dict()
    assert json.loads(json.dumps(values))["attention"]["keys"] == 16
    pruned = make("llama")
    report = hf_sparse.prune(pruned, hf_sparse.SparseConfig(method="magnitude"))
    page = tmp_path / "page.html"
    hf_sparse.write_report(report, page, evaluation=Evaluation(attention=found))
    text = page.read_text(encoding="utf-8")
    assert "Error of hs_block, mean over heads" in text
    assert text.count("model.layers.1.self_attn</th>") >= 4
    again = hf_sparse.Evaluation(attention=dataclasses.replace(found, heads=()))
    hf_sparse.write_report(report, page, evaluation=again)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, EvaluationError, "rank=0 must be at least 1 and at most queries=16"),
        ({"rank": 17}, EvaluationError, "rank=17"),
        ({"methods": ["hs_blok"]}, ConfigError, "did you mean 'hs_block'"),
        ({"attention": {"keys": 0}}, ConfigError, "keys=0"),
        ({"num_samples": 0}, EvaluationError, "num_samples=0"),
    ],
)
def test_wrong_arguments_are_named(model, changes, error, message):
    with pytest.raises(error, match=message):
        diagnose(model, **changes)


def test_a_model_with_an_attention_of_its_own_is_refused():
    sizes = {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(EvaluationError, match="Bloom"):
        diagnose(BloomForCausalLM(BloomConfig(**sizes)))
