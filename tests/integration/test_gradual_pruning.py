"""Pruning during training: exact counts in the end, what is gone stays gone, runs resume."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from short_runs import arguments, rows_of
from tiny_models import tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
)

import hf_sparse
from hf_sparse import ConfigError, SparseConfig, SparseLinear, TrainingError
from hf_sparse.core.patterns import keep_highest
from hf_sparse.core.statistics import Needs
from hf_sparse.solvers import SOLVERS, Solution, Solver
from hf_sparse.training import SparsityCallback

DEAD = torch.arange(8, 24)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def tiny():
    """One block: a schedule counts each layer's zeros by themselves."""
    return tiny_llama(num_hidden_layers=1)


def train(model, token_ids, folder, *callbacks, resume=None, **changes):
    trainer = Trainer(
        model,
        arguments(folder, **({"max_steps": 10} | changes)),
        train_dataset=rows_of(token_ids),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)


def zeros_of(model):
    layers = {n: m for n, m in model.named_modules() if n.endswith(LINEAR)}
    return {name: layer.weight == 0 for name, layer in layers.items()}


class Zeros(TrainerCallback):
    """The zeros of each layer after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(zeros_of(kwargs["model"]))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_grow_along_the_curve_to_exactly_the_sparsity(
    tiny, token_ids, tmp_path, method, pattern
):
    given = {"sparsity": 0.6} if pattern == "unstructured" else {"pattern": pattern}
    sparsity = given.get("sparsity", 0.5)
    watch = Zeros()
    callback = SparsityCallback("cubic", start=1, end=8, frequency=3, method=method, **given)
    train(tiny, token_ids, tmp_path, callback, watch)
    for name, final in watch.steps[-1].items():
        counts = [int(zeros[name].sum()) for zeros in watch.steps]
        rows, columns = final.shape
        per_row = method == "wanda" or pattern != "unstructured"
        whole = rows * int(sparsity * columns) if per_row else int(sparsity * final.numel())
        # Masks are chosen after steps 4, 7 and 8; after step 1 nothing is gone yet.
        reached = [0] * 3 + [1 - (1 - 3 / 7) ** 3] * 3 + [1 - (1 - 6 / 7) ** 3] + [1] * 3
        for count, fraction in zip(counts, reached, strict=True):
            assert fraction * whole - rows <= count <= fraction * whole + 1e-9
        assert counts[-1] == whole
        for earlier, later in zip(watch.steps, watch.steps[1:], strict=False):
            assert bool((earlier[name] <= later[name]).all())
    assert not bool((tiny.lm_head.weight == 0).any())


def test_the_lowest_magnitudes_go(tiny, token_ids, tmp_path):
    before = {n: m.weight.detach().clone() for n, m in tiny.named_modules() if n.endswith(LINEAR)}
    callback = SparsityCallback("cubic", start=0, end=1, frequency=1, sparsity=0.5)
    train(tiny, token_ids, tmp_path, callback, learning_rate=0.0)
    for name, zeros in zeros_of(tiny).items():
        magnitudes = before[name].abs()
        assert float(magnitudes[zeros].max()) <= float(magnitudes[~zeros].min())


def test_wanda_scores_by_the_inputs_of_training(tiny, token_ids, tmp_path):
    layer = tiny.model.layers[0].mlp.down_proj
    weight, squares = layer.weight.detach().clone(), torch.zeros(40, dtype=torch.float64)

    def collect(module, inputs):
        if module.training:
            rows = inputs[0].detach().double().reshape(-1, 40)
            for row in rows:
                squares.add_(row * row)

    handle = layer.register_forward_pre_hook(collect)
    callback = SparsityCallback(
        "cubic", start=0, end=2, frequency=5, sparsity=0.5, method="wanda", targets=["down_proj"]
    )
    train(tiny, token_ids, tmp_path, callback, max_steps=2, learning_rate=0.0)
    handle.remove()
    scores = weight.double().abs() * squares.sqrt()
    for row in range(len(weight)):
        lowest = set(scores[row].sort().indices[:20].tolist())
        assert set((layer.weight[row] == 0).nonzero().flatten().tolist()) == lowest
    assert not layer._forward_pre_hooks


def test_the_result_is_saved_sparse(tiny, token_ids, tmp_path):
    callback = SparsityCallback("cubic", end=8, frequency=2, pattern="2:4")
    train(tiny, token_ids, tmp_path / "run", callback)
    zeros = zeros_of(tiny)
    hf_sparse.prune(tiny, SparseConfig(method="keep"))
    tiny.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, expected in zeros.items():
        layer = again.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        assert layer.format.name == "n:m"
        assert torch.equal(layer.weight == 0, expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_resumed_run_goes_on_where_it_was(tiny, token_ids, tmp_path, method):
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    changes = {"save_strategy": "steps", "save_steps": 5}

    def callback():
        return SparsityCallback("cubic", start=0, end=8, frequency=4, sparsity=0.6, method=method)

    straight = Zeros()
    train(tiny, token_ids, tmp_path / "a", callback(), straight, **changes)
    expected = zeros_of(tiny)
    tiny.load_state_dict(state)
    resumed = Zeros()
    checkpoint = str(tmp_path / "a" / "checkpoint-5")
    train(tiny, token_ids, tmp_path / "b", callback(), resumed, resume=checkpoint, **changes)
    for name, zeros in straight.steps[4].items():  # masks were chosen after step 4
        assert bool(zeros.any())
        assert torch.equal(resumed.steps[0][name], zeros)
    for name, zeros in zeros_of(tiny).items():
        if method == "magnitude":
            assert torch.equal(zeros, expected[name])
        # wanda has seen the inputs since the checkpoint only: other zeros, as many of them.
        assert int(zeros.sum()) == int(expected[name].sum())


def test_layers_have_sparsities_of_their_own(tiny, token_ids, tmp_path):
    callback = SparsityCallback("cubic", end=4, frequency=2, sparsity={"mlp": 0.75, "q_proj": 0.25})
    train(tiny, token_ids, tmp_path, callback, max_steps=5)
    for name, zeros in zeros_of(tiny).items():
        expected = 0.75 if ".mlp." in name else 0.25 if name.endswith("q_proj") else 0
        assert int(zeros.sum()) == int(expected * zeros.numel())


def test_conv1d_layers_are_pruned_along_their_inputs(token_ids, tmp_path):
    model = tiny_gpt2(n_layer=1)
    changes = {"save_strategy": "steps", "save_steps": 6}
    callback = SparsityCallback("cubic", end=4, frequency=2, pattern="2:4", method="wanda")
    train(model, token_ids, tmp_path, callback, max_steps=6, **changes)
    weight = model.transformer.h[0].mlp.c_fc.weight.T  # (out, in)
    groups = (weight != 0).reshape(-1, 4).sum(dim=1)
    assert bool((groups == 2).all())


def test_zeros_of_dense_layers_are_kept_where_targets_say(tiny, token_ids, tmp_path):
    with torch.no_grad():
        for layer in tiny.model.layers:
            layer.mlp.up_proj.weight[:, ::3] = 0
    before = zeros_of(tiny)
    changes = {"save_strategy": "steps", "save_steps": 2}
    train(tiny, token_ids, tmp_path, SparsityCallback(targets=["up_proj"]), **changes)
    for name, zeros in zeros_of(tiny).items():
        assert torch.equal(zeros, before[name])


class Writes(TrainerCallback):
    """Fills a pruned layer at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kwargs["model"].model.layers[0].mlp.up_proj.weight.data.fill_(1)


@pytest.mark.parametrize("save", ["no", "steps"])
def test_zeros_that_were_written_to_stop_the_run(tiny, token_ids, tmp_path, save):
    callback = SparsityCallback("cubic", end=4, frequency=2, sparsity=0.5, targets=["up_proj"])
    text = r"layers\.0\.mlp\.up_proj has 480 weights outside of its mask"
    with pytest.raises(TrainingError, match=text):
        train(tiny, token_ids, tmp_path, callback, Writes(10), save_strategy=save, save_steps=10)


def test_a_dense_checkpoint_on_disk_that_lost_the_zeros_is_found(tiny, token_ids, tmp_path):
    save = tiny.save_pretrained

    def save_another(folder, **kwargs):
        weight = tiny.model.layers[0].mlp.up_proj.weight
        zeros = weight.data.clone()
        weight.data.fill_(1)
        save(folder, **kwargs)
        weight.data.copy_(zeros)

    tiny.save_pretrained = save_another
    callback = SparsityCallback("cubic", end=4, frequency=2, sparsity=0.5, targets=["up_proj"])
    with pytest.raises(TrainingError, match=r"up_proj has 480 weights .* in .*checkpoint-5"):
        train(tiny, token_ids, tmp_path, callback, save_strategy="steps", save_steps=5)


def test_a_run_that_stops_early_says_that_the_sparsity_was_not_reached(
    tiny, token_ids, tmp_path, caplog
):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    callback = SparsityCallback("cubic", end=8, frequency=2, sparsity=0.5)
    train(tiny, token_ids, tmp_path, callback, Stops())
    assert "the final sparsity is not reached" in caplog.text


def test_a_layer_without_inputs_has_no_score(tiny, token_ids, tmp_path):
    tiny.model.unused = torch.nn.Linear(4, 4)
    callback = SparsityCallback("cubic", end=4, frequency=2, sparsity=0.5, method="wanda")
    with pytest.raises(TrainingError, match=r"model\.unused has had no input"):
        train(tiny, token_ids, tmp_path, callback)


@dataclass(frozen=True)
class Uneven(Solver):
    """A method of somebody else's: the share of the column's size, times the input's norm."""

    name: ClassVar[str] = "uneven"
    needs: ClassVar[Needs] = Needs.COLUMN_NORMS

    def solve(self, weight, statistics, pattern):
        size = weight.abs()
        mask = pattern.mask((size / size.sum(dim=0)).nan_to_num() * statistics.column_norms)
        return Solution(weight.where(mask, 0), mask)


@dataclass(frozen=True)
class Smallest(Solver):
    """Would keep what is smallest, and so what is gone."""

    name: ClassVar[str] = "smallest"
    needs: ClassVar[Needs] = Needs.NOTHING

    def solve(self, weight, statistics, pattern):
        mask = self.mask(-weight.abs(), pattern)
        return Solution(weight.where(mask, 0), mask)

    def mask(self, scores, pattern):
        return pattern.mask(scores)


class Forgets(Smallest):
    """Chooses without the pattern's help, so that it brings back what is gone."""

    name: ClassVar[str] = "forgets"

    def mask(self, scores, pattern):
        return keep_highest(scores.view(1, -1), pattern.zeros(scores.numel())).view_as(scores)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", [Uneven, Smallest])
def test_a_registered_method_prunes_while_training_too(
    tiny, token_ids, tmp_path, method, pattern, monkeypatch
):
    monkeypatch.setattr(SOLVERS, "_classes", {**SOLVERS, method.name: method})
    watch = Zeros()
    callback = SparsityCallback("cubic", end=8, frequency=2, pattern=pattern, method=method.name)
    train(tiny, token_ids, tmp_path, callback, watch)
    for name, final in watch.steps[-1].items():
        assert int(final.sum()) == final.numel() // 2
        for earlier, later in zip(watch.steps, watch.steps[1:], strict=False):
            assert bool((earlier[name] <= later[name]).all())


def test_a_method_that_brings_back_what_is_gone_is_stopped(tiny, token_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(SOLVERS, "_classes", {**SOLVERS, "forgets": Forgets})
    callback = SparsityCallback("cubic", end=8, frequency=2, sparsity=0.5, method="forgets")
    with pytest.raises(TrainingError, match=r"'forgets' gave .*q_proj .* from pattern\.mask"):
        train(tiny, token_ids, tmp_path, callback)


def test_inputs_that_are_always_zero_do_not_bring_back_what_is_gone(tiny, token_ids, tmp_path):
    layer = tiny.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, given: given[0].index_fill(-1, DEAD, 0))
    watch = Zeros()
    callback = SparsityCallback(
        "cubic", end=8, frequency=1, sparsity=0.5, method="wanda", targets=["up_proj"]
    )
    train(tiny, token_ids, tmp_path, callback, watch)
    name = "model.layers.0.mlp.up_proj"
    for earlier, later in zip(watch.steps, watch.steps[1:], strict=False):
        assert bool((earlier[name] <= later[name]).all())
    assert int(later[name].sum()) == layer.weight.numel() // 2


def test_a_run_without_a_layer_to_prune_is_refused(tiny, token_ids, tmp_path):
    callback = SparsityCallback("cubic", end=8, sparsity={"mlp": 0.0}, targets=["mlp.up_proj"])
    text = r"no layer is to be pruned, model\.layers\.0\.mlp\.up_proj because its sparsity is 0"
    with pytest.raises(TrainingError, match=text):
        train(tiny, token_ids, tmp_path, callback)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"schedule": "linear"}, TrainingError, "schedule='linear' is not known"),
        ({"schedule": "cubic", "method": "sparsegpt"}, TrainingError, "method='sparsegpt' can't"),
        ({"schedule": "cubic", "frequency": 0}, TrainingError, "frequency=0 must be"),
        ({"schedule": "cubic", "method": "keep"}, TrainingError, "method='keep' can't"),
        ({"schedule": "cubic", "start": "0"}, TrainingError, "start='0' must be a step"),
        ({"schedule": "cubic", "end": math.nan}, TrainingError, "end=nan must be a step"),
        ({"sparsity": 0.5}, TrainingError, "sparsity and pattern need a schedule"),
        ({"schedule": "cubic", "sparsity": 1.5}, ConfigError, "sparsity=1.5"),
        ({"schedule": "cubic", "pattern": "4:2"}, ConfigError, "pattern='4:2'"),
    ],
)
def test_arguments_that_can_not_work_are_refused(given, error, text):
    with pytest.raises(error, match=text):
        SparsityCallback(**given)


def test_a_schedule_that_ends_behind_the_run_is_refused(tiny, token_ids, tmp_path):
    callback = SparsityCallback("cubic", start=0, end=50, sparsity=0.5)
    with pytest.raises(TrainingError, match="steps 0 and 50 of a run of 10"):
        train(tiny, token_ids, tmp_path, callback)
