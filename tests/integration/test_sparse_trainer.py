"""`SparseTrainer`: what a teacher adds to the loss, and which teachers don't fit."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from short_runs import arguments, rows_of
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear, TrainingError
from hf_sparse.training import SparseTrainer


@pytest.fixture
def teacher(tiny):
    return copy.deepcopy(tiny)


@pytest.fixture
def sparse(tiny, teacher):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.6))
    return tiny


def make(model, folder, rows=None, teacher=None, changes=None, **kwargs):
    settings = arguments(folder, **(changes or {}))
    return SparseTrainer(
        model, settings, train_dataset=rows, eval_dataset=rows, teacher=teacher, **kwargs
    )


def expected_terms(student, teacher, inputs, chosen, temperature):
    """KL and hidden error in float64 over the chosen positions, token by token."""
    with torch.no_grad():
        ours = student(**inputs, output_hidden_states=True)
        theirs = teacher(**inputs, output_hidden_states=True)
    p = F.softmax(theirs.logits.double() / temperature, dim=-1)
    q = F.softmax(ours.logits.double() / temperature, dim=-1)
    divergence = temperature**2 * (p * (p / q).log()).sum(dim=-1)[chosen].mean()
    errors = []
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    for s, t in list(pairs)[1:]:
        s, t = s.double()[chosen], t.double()[chosen]
        errors.append(float(((s - t) ** 2).sum() / (t**2).sum()))
    return float(divergence), sum(errors) / len(errors)


def gpt2():
    """Its class's name doesn't tell that it predicts the next token."""
    return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.mark.parametrize("build", [tiny_llama, gpt2])
def test_the_loss_is_that_of_trainer_and_the_teacher_s_terms(build, token_ids, tmp_path):
    sparse, teacher = build(), build()
    hf_sparse.prune(sparse, SparseConfig(method="magnitude", sparsity=0.6))
    labels = token_ids.clone()
    labels[:, :5] = -100
    inputs = {"input_ids": token_ids, "labels": labels}
    trainer = make(
        sparse, tmp_path, teacher=teacher, kl_weight=0.7, hidden_weight=0.3, temperature=2.0
    )
    sparse.train()
    loss = trainer.compute_loss(sparse, dict(inputs))
    # Position t predicts token t + 1: those that count are 4 to 14.
    chosen = torch.zeros(12, 16, dtype=torch.bool)
    chosen[:, 4:15] = True
    kl, hidden = expected_terms(sparse, teacher, {"input_ids": token_ids}, chosen, 2.0)
    with torch.no_grad():
        plain = float(sparse(**inputs).loss)
    assert float(loss.detach()) == pytest.approx(plain + 0.7 * kl + 0.3 * hidden, rel=1e-5)
    assert min(kl, hidden) > 5e-5


def test_terms_are_scaled_as_trainer_scales_its_loss_over_accumulated_batches(
    sparse, teacher, token_ids, tmp_path
):
    trainer = make(sparse, tmp_path, teacher=teacher)
    sparse.train()
    labels = token_ids.clone()
    labels[:7, 3:] = -100  # batches with unequal numbers of tokens
    items = int((labels[:, 1:] != -100).sum())
    trainer.hidden_weight = 0.0  # whose normalisation is a batch's own
    whole = trainer.compute_loss(sparse, {"input_ids": token_ids, "labels": labels})
    parts = [
        trainer.compute_loss(
            sparse,
            {"input_ids": token_ids[i : i + 4], "labels": labels[i : i + 4]},
            num_items_in_batch=torch.tensor(items),
        )
        for i in range(0, 12, 4)
    ]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


def test_the_evaluation_loss_is_that_of_trainer(sparse, teacher, token_ids, tmp_path):
    trainer = make(sparse, tmp_path, rows_of(token_ids), teacher)
    with torch.no_grad():
        losses = [sparse.eval()(b, labels=b).loss for b in token_ids.split(4)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


def test_training_brings_the_model_closer_to_the_teacher(sparse, teacher, token_ids, tmp_path):
    def divergence():
        chosen = torch.ones(12, 16, dtype=torch.bool)
        inputs = {"input_ids": token_ids}
        return expected_terms(sparse.eval(), teacher, inputs, chosen, 1.0)

    before = divergence()
    kept = {n: p.clone() for n, p in teacher.named_parameters()}
    zeros = {n: m.weight == 0 for n, m in sparse.named_modules() if isinstance(m, SparseLinear)}
    changes = {"max_steps": 12, "learning_rate": 1e-3}
    weights = {"kl_weight": 1e5, "hidden_weight": 1e5}
    make(sparse, tmp_path, rows_of(token_ids), teacher, changes, **weights).train()
    after = divergence()
    assert after[0] < 0.5 * before[0]
    assert after[1] < before[1]
    assert all(torch.equal(p, kept[n]) for n, p in teacher.named_parameters())
    assert all(torch.equal(sparse.get_submodule(n).weight == 0, z) for n, z in zeros.items())


class Gradients(TrainerCallback):
    """The gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.grads = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # 5.23 has another name for it
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_hidden_error_has_a_gradient_under_checkpointing(
    sparse, teacher, token_ids, tmp_path, reentrant
):
    grads = {}
    for checkpointing in (False, True):
        model, other = copy.deepcopy(sparse), copy.deepcopy(teacher)
        changes = {
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 12,
        }
        seen = Gradients()
        weights = {"kl_weight": 0.0, "hidden_weight": 5.0, "callbacks": [seen]}
        make(model, tmp_path, rows_of(token_ids), other, changes, **weights).train()
        grads[checkpointing] = seen.grads
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_autocast_in_bf16_and_accumulation_train_with_a_teacher(
    sparse, teacher, token_ids, tmp_path
):
    changes = {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make(sparse, tmp_path, rows_of(token_ids), teacher, changes)
    assert math.isfinite(trainer.train().training_loss)


def test_a_batch_without_labels_to_learn_adds_nothing(sparse, teacher, token_ids, tmp_path):
    trainer = make(sparse, tmp_path, teacher=teacher)
    sparse.train()
    inputs = {"input_ids": token_ids, "labels": torch.full_like(token_ids, -100)}
    loss = trainer.compute_loss(sparse, inputs, num_items_in_batch=torch.tensor(7))
    assert float(loss.detach()) == 0


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForSequenceClassification])
def test_encoders_learn_at_their_own_positions(token_ids, tmp_path, cls):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student = tiny_bert(cls, num_labels=3, **no_dropout)
    teacher = copy.deepcopy(student)
    hf_sparse.prune(student, SparseConfig(method="magnitude", sparsity=0.6))
    if cls is BertForMaskedLM:
        labels = token_ids.where(torch.arange(16) % 3 == 0, -100)
        chosen = labels != -100
    else:
        labels, chosen = torch.arange(12) % 3, torch.ones(12, dtype=torch.bool)
    trainer = make(student, tmp_path, teacher=teacher, hidden_weight=0.0)
    student.train()
    loss = trainer.compute_loss(student, {"input_ids": token_ids, "labels": labels})
    with torch.no_grad():
        plain = student(token_ids, labels=labels).loss
        p, q = (F.softmax(m(token_ids).logits.double(), dim=-1) for m in (teacher, student))
    kl = (p * (p / q).log()).sum(dim=-1)[chosen].mean()
    assert float(loss.detach()) == pytest.approx(float(plain) + float(kl), rel=1e-5)


def test_a_model_of_model_init_is_prepared(token_ids, tmp_path, tiny):
    def init():
        model = copy.deepcopy(tiny)
        hf_sparse.prune(model, SparseConfig(method="magnitude", sparsity=0.5))
        return model

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = SparseTrainer(args=arguments, model_init=init)
    assert any(name.endswith("weight_values") for name, _ in trainer.model.named_parameters())


def test_a_dense_model_learns_from_a_teacher_too(tiny, teacher, token_ids, tmp_path):
    trainer = make(tiny, tmp_path, rows_of(token_ids), teacher)
    assert math.isfinite(trainer.train().training_loss)


# --- teachers and weights that don't fit ----------------------------------------------------


def other_llama(model, **changes):
    config = model.config.to_dict() | changes
    config.pop("quantization_config", None)
    return LlamaForCausalLM(type(model.config)(**config))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocab_size": 99}, "the teacher's vocabulary has 99 entries, the model's 61"),
        ({"hidden_size": 32, "head_dim": 6}, "the teacher's hidden_size is 32, the model's 24"),
        ({"num_hidden_layers": 3}, "the teacher's num_hidden_layers is 3, the model's 2"),
    ],
)
def test_a_teacher_of_other_sizes_is_refused(sparse, tmp_path, changes, text):
    with pytest.raises(TrainingError, match=text):
        make(sparse, tmp_path, teacher=other_llama(sparse, **changes))


def test_a_deeper_teacher_serves_without_hidden_states(sparse, token_ids, tmp_path):
    teacher = other_llama(sparse, num_hidden_layers=3)
    trainer = make(sparse, tmp_path, rows_of(token_ids), teacher, hidden_weight=0.0)
    assert math.isfinite(trainer.train().training_loss)


def test_the_model_is_no_teacher_of_its_own(sparse, tmp_path):
    with pytest.raises(TrainingError, match="the same object"):
        make(sparse, tmp_path, teacher=sparse)


def test_a_teacher_on_another_device_is_refused(sparse, teacher, token_ids, tmp_path):
    trainer = make(sparse, tmp_path, teacher=teacher.to("meta"))
    sparse.train()
    with pytest.raises(TrainingError, match=r"the teacher is on meta, the model on cpu: call"):
        trainer.compute_loss(sparse, {"input_ids": token_ids, "labels": token_ids})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be"),
        ({"hidden_weight": float("nan")}, "hidden_weight=nan must be"),
        ({"temperature": 0}, "temperature=0 must be"),
        ({"kl_weight": 0.0, "hidden_weight": 0.0}, "the teacher has no effect"),
    ],
)
def test_weights_that_can_not_work_are_refused(sparse, teacher, tmp_path, given, text):
    with pytest.raises(TrainingError, match=text):
        make(sparse, tmp_path, teacher=teacher, **given)


def test_quantised_layers_are_refused_with_what_to_do(tiny, tmp_path):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.5, bits=4))
    with pytest.raises(TrainingError, match="train a LoRA adapter"):
        make(tiny, tmp_path)
