"""The loss of right reasons against the same written out, and what training with it does."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from transformers import BertForSequenceClassification, TrainingArguments

import hf_sparse
from hf_sparse import SparseConfig, TrainingError
from hf_sparse.training import ExplanationLoss, SparseTrainer, prepare_for_training

IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0])


def classifier(**changes):
    return tiny_bert(BertForSequenceClassification, attn_implementation="eager", **changes)


def language_model(sparsity=0.0):
    model = tiny_llama(attn_implementation="eager")
    if sparsity:
        hf_sparse.prune(model, SparseConfig(method="magnitude", sparsity=sparsity))
    return model


def gpt2(sparsity=0.0):
    """Its class has no name that tells what it predicts."""
    model = tiny_gpt2(attn_implementation="eager")
    if sparsity:
        hf_sparse.prune(model, SparseConfig(method="magnitude", sparsity=sparsity))
    return model


def expected_penalty(model, mask):
    """Eq. 3, from embeddings that are handed to the model."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits = logits[:, :-1] if logits.ndim == 3 else logits
    total = logits.log_softmax(-1).sum()
    (gradient,) = torch.autograd.grad(total, embedded, create_graph=True)
    return (mask.unsqueeze(-1) * gradient).square().sum() / len(IDS)


@pytest.mark.parametrize("masked", ["ids", "a function"])
def test_the_penalty_of_a_classifier_is_that_of_the_paper(masked):
    model, ids = classifier(), [int(IDS[0, 3]), int(IDS[1, 7])]
    mask = (ids[0] == IDS) | (ids[1] == IDS)
    irrelevant = ids if masked == "ids" else (lambda input_ids: mask)
    loss = ExplanationLoss(model, irrelevant=irrelevant, weight=3.0)
    found = loss(model(input_ids=IDS), LABELS)
    loss.remove()
    expected = F.cross_entropy(model(input_ids=IDS).logits, LABELS)
    torch.testing.assert_close(found, expected + 3 * expected_penalty(model, mask))
    names = ["bert.embeddings.word_embeddings.weight", "classifier.weight"]
    wanted = [dict(model.named_parameters())[name] for name in names]
    for a, b in zip(
        torch.autograd.grad(found, wanted[1:]),
        torch.autograd.grad(expected + 3 * expected_penalty(model, mask), wanted[1:]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_positions_with_labels_of_a_language_model_count():
    model, mask = language_model(0.5), IDS % 2 == 0
    loss = ExplanationLoss(model, irrelevant=lambda ids: ids % 2 == 0)
    found = loss(model(input_ids=IDS), IDS)
    loss.remove()
    logits = model(input_ids=IDS).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(found, expected + expected_penalty(model, mask))
    loss = ExplanationLoss(model, irrelevant=[5])
    halved = loss(model(input_ids=IDS), IDS, num_items_in_batch=36)
    again = loss(model(input_ids=IDS), IDS)
    torch.testing.assert_close(halved * 2, again)


def test_the_gradient_in_kept_values_agrees_with_finite_differences():
    model = language_model(0.5).double()
    prepare_for_training(model, torch.float64)
    loss = ExplanationLoss(model, irrelevant=lambda ids: ids > 20, weight=0.5)
    values = model.model.layers[0].mlp.up_proj.weight_values
    loss(model(input_ids=IDS), IDS).backward()
    for place in values.grad.abs().topk(2).indices.tolist():
        found, step, results = float(values.grad[place]), 3e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                values[place] += sign * step
            results.append(loss(model(input_ids=IDS), IDS).item())
            with torch.no_grad():
                values[place] -= sign * step
        slope = (results[0] - results[1]) / (2 * step)
        assert found == pytest.approx(slope, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("make", [language_model, gpt2])
def test_the_reasons_of_the_dense_model_are_kept(make):
    dense, model = make(), make(0.5)
    loss = ExplanationLoss(model, dense=dense)

    def gradient(of):
        embedded = of.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = of(inputs_embeds=embedded).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
        return torch.autograd.grad(total, embedded)[0], total / 18

    found = loss(model(input_ids=IDS), IDS)
    loss.remove()
    (own, expected), (kept, _) = gradient(model), gradient(dense)
    penalty = (own - kept).square().sum() / kept.square().sum()
    torch.testing.assert_close(found, expected + penalty)
    expected = gradient(dense)[1]
    same = ExplanationLoss(dense, dense=make())
    torch.testing.assert_close(same(dense(input_ids=IDS), IDS), expected)


def test_an_encoder_decoder_hangs_on_the_inputs_of_its_encoder():
    model = tiny_t5(attn_implementation="eager")
    loss = ExplanationLoss(model, irrelevant=lambda ids: ids % 2 == 0, weight=3.0)
    found = loss(model(input_ids=IDS, labels=IDS.flip(1)), IDS.flip(1))
    loss.remove()
    embedded = model.get_encoder().get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, labels=IDS.flip(1)).logits
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).sum(), embedded)
    penalty = ((IDS % 2 == 0).unsqueeze(-1) * gradient).square().sum() / len(IDS)
    expected = F.cross_entropy(logits.flatten(0, 1), IDS.flip(1).flatten())
    torch.testing.assert_close(found, expected + 3 * penalty)


def test_training_with_it_lowers_the_penalty_and_evaluation_is_the_cross_entropy(tmp_path):
    model, mask = language_model(0.5), IDS % 2 == 0
    before = expected_penalty(model, mask).item()
    loss = ExplanationLoss(model, irrelevant=lambda ids: ids % 2 == 0, weight=10.0)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=15, learning_rate=1e-2, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SparseTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, compute_loss_func=loss
    )
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]
    loss.remove()
    assert expected_penalty(model.eval(), mask).item() < 0.7 * before
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    assert measured == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of the two"),
        ({"irrelevant": [1], "dense": "the dense model"}, "one of the two"),
        ({"irrelevant": []}, "must be token ids"),
        ({"irrelevant": ["the"]}, "must be token ids"),
        ({"irrelevant": [1], "weight": 0}, "weight=0"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(arguments, message):
    with pytest.raises(TrainingError, match=message):
        ExplanationLoss(language_model(), **arguments)


def test_fused_attention_missing_labels_and_masks_of_another_shape_are_errors():
    with pytest.raises(TrainingError, match='set_attn_implementation\\("eager"\\)'):
        ExplanationLoss(tiny_llama(attn_implementation="sdpa"), irrelevant=[1])
    model = language_model()
    loss = ExplanationLoss(model, irrelevant=lambda ids: ids[0] > 0)
    outputs = model(input_ids=IDS)
    with pytest.raises(TrainingError, match="the data have none"):
        loss(outputs, None)
    with pytest.raises(TrainingError, match=r"mask of shape \(10,\), expected \(2, 10\)"):
        loss(outputs, IDS)
    with pytest.raises(TrainingError, match="has seen no forward pass"):
        loss(outputs, IDS)
    with pytest.raises(TrainingError, match="pass input_ids by name"):
        model(IDS)
