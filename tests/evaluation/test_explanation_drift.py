"""Attributions against finite differences, and how two models' are compared."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification

import hf_sparse
from conftest import layer_report
from hf_sparse import EvaluationError, PruningReport, SparseConfig, explanation_drift, write_report
from hf_sparse.evaluation.attributions import attributions, rank_correlation

IDS = [
    torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(i))
    for i, n in enumerate((12, 9, 12))
]


def log_probability(model, embeddings, target):
    """Of the target behind the last token, or as the class; from embeddings, in fp64."""
    logits = model(inputs_embeds=embeddings).logits
    logits = logits[:, -1] if logits.ndim == 3 else logits
    return logits.log_softmax(-1)[0, target].item()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("times_input", [True, False])
def test_attributions_agree_with_finite_differences(kind, times_input):
    model = tiny_llama() if kind == "llama" else tiny_bert(BertForSequenceClassification)
    model = model.double()
    ids = IDS[0].unsqueeze(0)
    found, scores = attributions(model, {"input_ids": ids}, torch.tensor([11]), None, times_input)
    target = scores.argmax(-1)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        step = 3e-3  # Llama's norms are in fp32 whatever the model is
        for token in (0, 5, 11):
            slopes = []
            directions = embedded[:, token] if times_input else torch.eye(24).double()
            for direction in directions:
                moved = [embedded.clone(), embedded.clone()]
                moved[0][0, token] += step * direction
                moved[1][0, token] -= step * direction
                up, down = (log_probability(model, e, int(target)) for e in moved)
                slopes.append((up - down) / (2 * step))
            expected = slopes[0] if times_input else float(np.linalg.norm(slopes))
            assert abs(float(found[0, token]) - expected) <= 1e-2 * max(1e-2, abs(expected))


def test_ranks_of_equal_values_are_their_mean():
    a, b = torch.tensor([1.0, 2, 2, 3]), torch.tensor([10.0, 30, 20, 40])
    expected = np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(torch.ones(3), torch.ones(3)) == 1
    assert rank_correlation(torch.ones(3), torch.arange(3.0)) == 0


def test_a_model_has_its_own_reasons():
    model = tiny_llama()
    drift = explanation_drift(model, model, IDS, top=4)
    assert (drift.rank_correlation, drift.overlap, drift.same_prediction) == (1, 1, 1)
    assert sorted(sample.tokens for sample in drift.samples) == [9, 12, 12]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_drift_is_that_of_the_attributions_of_each_sample(batch_size):
    dense, sparse = tiny_llama(), tiny_llama()
    hf_sparse.prune(sparse, SparseConfig(method="magnitude", sparsity=0.7))
    drift = explanation_drift(dense, sparse, IDS, top=4, batch_size=batch_size)
    expected = []
    for ids in IDS:
        batch, last = {"input_ids": ids.unsqueeze(0)}, torch.tensor([len(ids) - 1])
        ours, scores = attributions(dense, batch, last)
        target = scores.argmax(-1)
        theirs, scores = attributions(sparse, batch, last, target)
        found = scores.argmax(-1)
        best = [set(np.argsort(-np.abs(x[0].numpy()))[:4].tolist()) for x in (ours, theirs)]
        ranks = [np.argsort(np.argsort(x[0].numpy())) for x in (ours, theirs)]
        correlation = round(float(np.corrcoef(*ranks)[0, 1]), 3)
        overlap = len(best[0] & best[1]) / 4
        expected.append((len(ids), correlation, overlap, bool(target == found)))
    got = [
        (s.tokens, round(s.rank_correlation, 3), s.overlap, s.same_prediction)
        for s in drift.samples
    ]
    assert sorted(got) == sorted(expected)
    assert -1 < drift.rank_correlation < 1
    assert dense.training is sparse.training is False
    assert all(p.grad is None for p in dense.parameters())


def test_a_classifier_is_asked_about_its_class():
    dense, sparse = (tiny_bert(BertForSequenceClassification, num_labels=3) for _ in range(2))
    hf_sparse.prune(sparse, SparseConfig(method="magnitude", sparsity=0.9))
    drift = explanation_drift(dense, sparse, IDS, times_input=False)
    assert drift.rank_correlation < 1
    assert "norm of the gradient" in str(drift)
    assert len(drift.to_dict()["samples"]) == 3


def test_the_page_shows_the_samples_that_differ_most_first(tmp_path):
    dense, sparse = tiny_llama(), tiny_llama()
    hf_sparse.prune(sparse, SparseConfig(method="magnitude", sparsity=0.9))
    drift = explanation_drift(dense, sparse, IDS)
    report = PruningReport((layer_report("layer"),))
    write_report(report, tmp_path / "page.html", drift=drift)
    page = (tmp_path / "page.html").read_text()
    assert f"rank correlation {drift.rank_correlation:.3f}" in page
    least = min(sample.rank_correlation for sample in drift.samples)
    assert page.index(f"{least:.3f}</td>") > page.index("Attributions of both models")
    write_report(report, tmp_path / "without.html")
    assert "Attributions" not in (tmp_path / "without.html").read_text()


def test_what_has_no_embeddings_or_no_tokens_is_an_error():
    with pytest.raises(EvaluationError, match="no input embeddings"):
        explanation_drift(nn.Linear(2, 2), tiny_llama(), IDS)
    for top in (0, 1.5, "3"):
        with pytest.raises(EvaluationError, match=f"top={top!r} must be an integer"):
            explanation_drift(tiny_llama(), tiny_llama(), IDS, top=top)
    with pytest.raises(EvaluationError, match="no sample has two tokens"):
        explanation_drift(tiny_llama(), tiny_llama(), [torch.tensor([5])])


def test_a_model_that_predicts_no_next_token_of_its_inputs_is_an_error():
    translations = [{"input_ids": IDS[0][None], "decoder_input_ids": IDS[0][None]}]
    for model, data in ((tiny_t5(), translations), (tiny_bert(BertForMaskedLM), IDS)):
        with pytest.raises(EvaluationError, match="neither a class nor the next token"):
            explanation_drift(model, model, data)


def test_reasons_that_are_no_numbers_are_not_compared():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = math.inf
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        explanation_drift(tiny_llama(), model, IDS)


def test_gradients_are_taken_in_inference_mode_too():
    dense, sparse = tiny_llama(), tiny_llama()
    hf_sparse.prune(sparse, SparseConfig(method="magnitude", sparsity=0.7))
    expected = explanation_drift(dense, sparse, IDS)
    with torch.inference_mode():
        assert explanation_drift(dense, sparse, IDS) == expected


@pytest.mark.parametrize(("own", "other"), [(3, 5), (5, 3)])
def test_models_of_different_classes_are_not_compared(own, other):
    dense, sparse = (
        tiny_bert(BertForSequenceClassification, num_labels=count) for count in (own, other)
    )
    with torch.no_grad():
        dense.classifier.bias[own - 1] = 100  # what it predicts, which the smaller one lacks
    with pytest.raises(EvaluationError, match=rf"{other} classes|sparse one {other}"):
        explanation_drift(dense, sparse, IDS)
