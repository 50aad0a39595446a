"""Full fine-tuning through Trainer: values train, the pattern stays, checkpoints are sparse."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from short_runs import arguments, rows_of
from tiny_models import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear, TrainingError
from hf_sparse.training import SparseTrainer, SparsityCallback, prepare_for_training

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers

CONFIGS = {
    "unstructured": SparseConfig(method="magnitude", sparsity=0.5),
    "2:4": SparseConfig(method="magnitude", pattern="2:4"),
}


@pytest.fixture
def tiny():
    """One block: values train layer by layer."""
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def sparse(tiny):
    hf_sparse.prune(tiny, CONFIGS["unstructured"])
    return tiny


def train(model, token_ids, folder, cls=SparseTrainer, callbacks=(), resume=None, **changes):
    options = {k: changes.pop(k) for k in [*changes] if k in ("teacher", "hidden_weight")}
    trainer = cls(
        model,
        arguments(folder, **changes),
        train_dataset=rows_of(token_ids),
        callbacks=list(callbacks),
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def masks_of(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    return {name: layer.weight != 0 for name, layer in layers.items()}


def values_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "weight_values" in n}


def same_masks(model, masks):
    found = masks_of(model)
    return found.keys() == masks.keys() and all(torch.equal(found[n], masks[n]) for n in masks)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cls", [Trainer, SparseTrainer])
def test_values_train_and_the_pattern_stays(tiny, token_ids, tmp_path, name, cls):
    hf_sparse.prune(tiny, CONFIGS[name])
    masks = masks_of(tiny)
    prepare_for_training(tiny)
    before = values_of(tiny)
    with torch.no_grad():
        loss = tiny(token_ids, labels=token_ids).loss
    train(tiny, token_ids, tmp_path, cls, [SparsityCallback()], max_steps=8)
    after = values_of(tiny)
    assert before
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[n], after[n]) for n in before)
    assert same_masks(tiny, masks)
    with torch.no_grad():
        assert tiny.eval()(token_ids, labels=token_ids).loss < loss


def test_training_equals_that_of_a_dense_model_whose_gradients_are_masked(
    tiny, token_ids, tmp_path
):
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    hf_sparse.prune(tiny, CONFIGS["unstructured"])
    masks = masks_of(tiny)
    config = tiny.config.to_dict()
    config.pop("quantization_config")
    twin = LlamaForCausalLM(type(tiny.config)(**config))
    twin.load_state_dict(state)
    for name, mask in masks.items():
        weight = twin.get_submodule(name).weight
        weight.data.mul_(mask)
        weight.register_hook(lambda grad, mask=mask: grad * mask)
    # Without decay, Adam's step for a gradient that was always 0 is 0.
    changes = {"max_steps": 6, "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch"}
    train(tiny, token_ids, tmp_path, **changes)
    train(twin, token_ids, tmp_path, Trainer, **changes)
    for name in masks:
        torch.testing.assert_close(
            tiny.get_submodule(name).weight,
            twin.get_submodule(name).weight.detach(),
            rtol=1e-3,
            atol=1e-5,
        )


def test_accumulated_gradients_are_those_of_the_whole_batch(sparse, token_ids, tmp_path):
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    changes = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    train(sparse, token_ids, tmp_path, per_device_train_batch_size=12, **changes)
    whole = values_of(sparse)
    sparse.load_state_dict(state)
    train(
        sparse,
        token_ids,
        tmp_path,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        **changes,
    )
    for name, values in values_of(sparse).items():
        torch.testing.assert_close(values, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(sparse, token_ids, tmp_path, reentrant):
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    train(sparse, token_ids, tmp_path)
    expected = values_of(sparse)
    sparse.load_state_dict(state)
    train(
        sparse,
        token_ids,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    for name, values in values_of(sparse).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6)


def test_autocast_in_bf16_trains_values_in_fp32(sparse, token_ids, tmp_path):
    masks = masks_of(sparse)
    with torch.no_grad():
        loss = sparse(token_ids, labels=token_ids).loss
    train(sparse, token_ids, tmp_path, bf16=True, max_steps=8)
    assert {values.dtype for values in values_of(sparse).values()} == {torch.float32}
    assert same_masks(sparse, masks)
    with torch.no_grad():
        assert sparse.eval()(token_ids, labels=token_ids).loss < loss


def test_a_model_in_bf16_trains_with_values_in_fp32_and_in_bf16(tiny, token_ids, tmp_path):
    hf_sparse.prune(tiny.bfloat16(), CONFIGS["unstructured"])
    tiny.save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        masks = masks_of(model)
        with torch.no_grad():
            loss = model(token_ids, labels=token_ids).loss
        prepare_for_training(model, dtype)
        train(model, token_ids, tmp_path / "run", max_steps=8)
        assert {values.dtype for values in values_of(model).values()} == {dtype}
        assert same_masks(model, masks)
        with torch.no_grad():
            assert model.eval()(token_ids, labels=token_ids).loss < loss


@pytest.mark.parametrize("shards", [1, 3])
def test_a_run_that_is_resumed_ends_where_it_would_have(
    tiny, token_ids, tmp_path, shards, monkeypatch
):
    hf_sparse.prune(tiny, CONFIGS["unstructured"])
    tiny.save_pretrained(tmp_path / "base")

    def model():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    if shards > 1:
        save = hf_sparse.publish.save.save_pretrained
        monkeypatch.setattr(
            hf_sparse.quantizer,
            "install_saving",
            lambda m: setattr(
                m, "save_pretrained", lambda *a, **k: save(m, *a, **(k | {"max_shard_size": "9KB"}))
            ),
        )
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    callbacks = [SparsityCallback()]
    straight = model()
    train(straight, token_ids, tmp_path / "run", callbacks=callbacks, **changes)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "model.safetensors").exists() == (shards == 1)
    again = model()
    train(
        again, token_ids, tmp_path / "rest", callbacks=callbacks, resume=str(checkpoint), **changes
    )
    expected = {n: p.detach() for n, p in straight.named_parameters()}
    found = {n: p.detach() for n, p in again.named_parameters()}
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_of_trainer_is_a_sparse_model(sparse, token_ids, tmp_path):
    masks = masks_of(sparse)
    train(sparse, token_ids, tmp_path, save_strategy="steps", save_steps=4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same_masks(again, masks)
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids).logits, sparse.eval()(token_ids).logits)


def test_the_best_checkpoint_is_loaded_at_the_end(sparse, token_ids, tmp_path):
    rows = rows_of(token_ids)
    trainer = SparseTrainer(
        sparse,
        arguments(
            tmp_path,
            max_steps=4,
            learning_rate=3.0,  # every step makes it worse
            warmup_steps=1,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < 4
    for name, layer in best.named_modules():
        if isinstance(layer, SparseLinear):
            assert torch.equal(layer.weight, sparse.get_submodule(name).weight)


# --- what watches the pattern ---------------------------------------------------------------


class Breaks(TrainerCallback):
    """Writes to a layer behind the optimiser's back, after the second step."""

    def __init__(self, what):
        self.what = what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.what(kwargs["model"])


NAME = "model.layers.0.mlp.up_proj"


def exchange_bits(model):
    """A kept weight for another one: the number of values stays."""
    bitmask = model.get_submodule(NAME).weight_bitmask
    byte = int(bitmask[0, 0])
    one = next(i for i in range(8) if byte >> i & 1)
    zero = next(i for i in range(8) if not byte >> i & 1)
    bitmask[0, 0] = byte ^ (1 << one) ^ (1 << zero)


def test_a_pattern_that_broke_stops_training_at_the_save(sparse, token_ids, tmp_path):
    with pytest.raises(
        TrainingError, match=rf"{NAME} has 1 weights outside of its mask and lacks 1 "
    ):
        train(
            sparse,
            token_ids,
            tmp_path,
            callbacks=[SparsityCallback(), Breaks(exchange_bits)],
            save_strategy="steps",
            save_steps=3,
        )
    assert (tmp_path / "checkpoint-3").exists()


def test_a_pattern_that_broke_stops_training_at_the_end_without_a_save(sparse, token_ids, tmp_path):
    with pytest.raises(TrainingError, match=f"the sparsity pattern broke: {NAME}"):
        train(sparse, token_ids, tmp_path, callbacks=[SparsityCallback(), Breaks(exchange_bits)])


def test_a_layer_that_became_dense_is_found(sparse, token_ids, tmp_path):
    def fill(model):
        layer = model.get_submodule(NAME)
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        model.get_submodule("model.layers.0.mlp").up_proj = dense

    with pytest.raises(TrainingError, match=rf"{NAME} has 480 weights outside of its mask"):
        train(sparse, token_ids, tmp_path, callbacks=[SparsityCallback(), Breaks(fill)])


def test_a_checkpoint_on_disk_that_lost_the_pattern_is_found(sparse, token_ids, tmp_path):
    save = sparse.save_pretrained

    def save_another(folder, **kwargs):
        exchange_bits(sparse)
        save(folder, **kwargs)
        exchange_bits(sparse)

    sparse.save_pretrained = save_another
    with pytest.raises(TrainingError, match=rf"{NAME} has .* in .*checkpoint-2"):
        train(
            sparse,
            token_ids,
            tmp_path,
            callbacks=[SparsityCallback()],
            save_strategy="steps",
            save_steps=2,
        )


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_s_run_is_watched_too(tiny, token_ids, tmp_path, bits):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.5, bits=bits))
    masks = masks_of(tiny)
    model = get_peft_model(tiny, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(model, token_ids, tmp_path, callbacks=[SparsityCallback()], **settings)
    assert same_masks(model.unload(), masks)


def test_a_dense_model_without_a_schedule_has_nothing_to_watch(tiny, token_ids, tmp_path):
    with pytest.raises(TrainingError, match="LlamaForCausalLM has no sparse layer to watch"):
        train(tiny, token_ids, tmp_path, callbacks=[SparsityCallback()])


# --- two processes --------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import logging
from hf_sparse.training import SparseTrainer, SparsityCallback
import hf_sparse

logging.disable_progress_bar()
base, folder, batch = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base)
arguments = TrainingArguments(
    output_dir=folder, max_steps=3, per_device_train_batch_size=int(batch), optim="sgd",
    learning_rate=0.5, report_to=[], save_strategy="steps", save_steps=3, use_cpu=True,
    disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
)
token_ids = torch.randint(3, 61, (12, 16), generator=torch.Generator().manual_seed(1))
rows = rows_of(token_ids)
teacher = AutoModelForCausalLM.from_pretrained(base).dequantize()
trainer = SparseTrainer(
    model, arguments, train_dataset=rows, callbacks=[SparsityCallback()], teacher=teacher,
    hidden_weight=0.0,
)
trainer.train()
print("processes", trainer.accelerator.num_processes)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "base")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_machines", "1", "--main_process_port", "0"]
    # With --cpu, two processes would want MPI; --multi_gpu has torch start them.
    runs = {
        "one": ["--cpu", "--num_processes", "1"],
        "two": ["--multi_gpu", "--num_processes", "2"],
    }
    for (name, processes), batch in zip(runs.items(), ("12", "6"), strict=True):
        command = [*launcher, *processes, str(script), str(tmp_path / "base")]
        command += [str(tmp_path / name), batch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"processes {len(runs) if name == 'two' else 1}" in done.stdout
    masks = masks_of(sparse)
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-3") for name in runs
    )
    assert same_masks(two, masks)
    for (name, first), (_, second) in zip(one.named_modules(), two.named_modules(), strict=True):
        if isinstance(first, SparseLinear):
            torch.testing.assert_close(second.weight, first.weight, rtol=1e-4, atol=1e-6, msg=name)
