"""compare: its figures are those of runs on their own, and the model stays as it was."""

import copy
import math
import runpy
import sys
import weakref

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers.utils import logging

import hf_sparse
from hf_sparse import (
    CalibrationError,
    ConfigError,
    EvaluationError,
    SolveError,
    SparseConfig,
    compare,
    perplexity,
    prune,
)
from hf_sparse.pruning import dense_measurements


@pytest.fixture
def tiny():
    """One block: what compare shares between runs does not depend on their number."""
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def settings(token_ids):
    return {"dataset": list(token_ids), "num_samples": 12, "batch_size": 1, "seq_len": 16}


@pytest.fixture
def held_out():
    return list(torch.randint(3, 61, (5, 16), generator=torch.Generator().manual_seed(2)))


def alone(model, method, setting, settings, held_out):
    """Perplexity, and the report, of a run of `prune` on its own."""
    amount = {"pattern" if isinstance(setting, str) else "sparsity": setting}
    pruned = copy.deepcopy(model)
    report = prune(pruned, SparseConfig(method=method, **amount, **settings))
    return perplexity(pruned, None, held_out, 16).perplexity, report


@pytest.mark.parametrize("as_function", [False, True])
def test_figures_are_those_of_separate_runs(tiny, settings, held_out, as_function):
    methods, sparsities = ["wanda", "balanced"], [0.5, "2:4"]
    model = (lambda: copy.deepcopy(tiny)) if as_function else tiny
    result = compare(model, methods, sparsities, held_out, **settings)
    assert result.dense == perplexity(tiny, None, held_out, 16).perplexity
    assert [(p.method, p.setting) for p in result.points] == [
        (method, setting) for method in methods for setting in sparsities
    ]
    for point in result.points:
        score, report = alone(tiny, point.method, point.setting, settings, held_out)
        assert point.score == score
        assert point.sparsity == report.sparsity
        assert point.bytes_dense == report.bytes_before
        assert point.bytes_stored == report.bytes_after
        assert point.bytes_resident == report.bytes_resident
        assert result.data == report.data
        assert result.environment == report.environment


def test_the_model_is_bit_identical_afterwards(tiny, settings, held_out):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    modules = [(name, type(module)) for name, module in tiny.named_modules()]
    config, attributes = tiny.config.to_dict(), set(vars(tiny))
    tiny.train()
    compare(tiny, ["sparsegpt", "magnitude"], [0.5], held_out, **settings)
    assert tiny.training
    assert tiny.config.to_dict() == config
    assert set(vars(tiny)) == attributes
    assert [(name, type(module)) for name, module in tiny.named_modules()] == modules
    after = tiny.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_of_loaded_models_only_one_is_in_memory_at_a_time(tiny, settings, held_out, monkeypatch):
    loaded = []

    def load():
        assert [model() for model in loaded] == [None] * len(loaded)
        model = copy.deepcopy(tiny)
        loaded.append(weakref.ref(model))
        return model

    def broken(self, *args, **kwargs):
        raise SolveError("it does not converge")

    monkeypatch.setattr(hf_sparse.solvers.SOLVERS["alps"], "solve", broken)
    result = compare(load, ["alps", "balanced"], [0.5, "2:4"], held_out, **settings)
    assert len(loaded) == 5
    assert [p.error is None for p in result.points] == [False, False, True, True]


def counted(monkeypatch, name, calls):
    """Keep the names of the measurements that are called."""
    measure = getattr(dense_measurements, name)

    def wrapped(*args):
        calls.append(name)
        return measure(*args)

    monkeypatch.setattr(dense_measurements, name, wrapped)


def test_the_dense_model_is_measured_once(tiny, settings, held_out, monkeypatch):
    calls = []
    for name in ("collect_metrics", "_costs", "_outliers"):
        counted(monkeypatch, name, calls)
    methods = {
        "balanced": {"method": "balanced"},
        "fast, fisher": {"method": "fast", "allocation": "fisher"},
        "wanda, owl": {"method": "wanda", "allocation": "owl"},
        "sparsegpt, owl": {"method": "sparsegpt", "allocation": "owl"},
    }
    result = compare(tiny, methods, [0.5, 0.6], held_out, **settings)
    assert sorted(calls) == ["_costs", "_outliers", "collect_metrics"]
    assert result.methods == methods


def test_other_layers_are_another_measurement(tiny, settings, held_out, monkeypatch):
    calls = []
    counted(monkeypatch, "collect_metrics", calls)
    mlp = {"method": "fast", "allocation": "fisher", "targets": ["mlp"]}
    compare(tiny, {"mlp": mlp, "all": {**mlp, "targets": None}}, [0.5, 0.6], held_out, **settings)
    assert len(calls) == 2


def test_the_time_of_a_shared_measurement_counts_for_every_run(
    tiny, settings, held_out, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(dense_measurements.time, "perf_counter", lambda: now[0])
    measure = dense_measurements.collect_metrics

    def slow(*args):
        now[0] += 3600
        return measure(*args)

    monkeypatch.setattr(dense_measurements, "collect_metrics", slow)
    result = compare(tiny, ["wanda", "balanced"], [0.5, 0.6], held_out, **settings)
    assert [p.seconds for p in result.points] == [0, 0, 3600, 3600]


def test_data_are_tokenised_once_also_from_an_iterator(trained, data_path):
    texts = ["a function that returns a list of values " * 40] * 3
    result = compare(
        trained, ["magnitude", "wanda"], [0.5], iter(texts),
        dataset=iter(texts), num_samples=4, seq_len=32, targets=["layers.0"],
    )  # fmt: skip
    assert result.data.count == 4
    assert result.evaluation.tokens >= 4 * 32
    assert all(p.error is None for p in result.points)


def test_a_function_of_the_caller_takes_the_place_of_perplexity(tiny, settings):
    seen = []

    def zeros(model):
        seen.append(model)
        layer = model.model.layers[0].mlp.up_proj
        return (layer.weight == 0).double().mean()

    result = compare(tiny, ["wanda"], [0.5, 0.75], evaluate=zeros, **settings)
    assert result.measure == "zeros"
    assert (result.dense, [p.score for p in result.points]) == (0.0, [0.5, 0.75])
    assert result.evaluation is None
    assert seen[0] is tiny
    assert tiny not in seen[1:]
    named = compare(tiny, ["wanda"], [0.5], evaluate=lambda model: 1, **settings)
    assert named.measure == "score"


def test_a_module_that_is_no_transformers_model_is_compared_by_a_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.randn(32, 8)
    expected = model(inputs).detach()

    def error(pruned):
        return float((pruned(inputs) - expected).norm())

    data = [{"input": row[None]} for row in inputs]
    result = compare(
        model, ["magnitude", "sparsegpt"], [0.5], evaluate=error, dataset=data, num_samples=32
    )
    assert result.dense == 0
    assert 0 < result.points[1].score < result.points[0].score


# --- failures -------------------------------------------------------------------------------


def test_a_run_that_fails_is_reported_and_the_others_go_on(tiny, settings, held_out, monkeypatch):
    def broken(self, *args, **kwargs):
        raise SolveError("it does not converge")

    monkeypatch.setattr(hf_sparse.solvers.SOLVERS["alps"], "solve", broken)
    result = compare(tiny, ["alps", "wanda"], [0.5, 0.6], held_out, **settings)
    failed = ["does not converge" in (p.error or "") for p in result.points]
    assert failed == [True, True, False, False]
    assert result.points[0].score is None
    assert str(result).count("failed") == 2
    with pytest.raises(SolveError, match=r"layer model\.layers.*does not converge"):
        compare(tiny, ["alps"], [0.5, 0.6], held_out, **settings)


def test_a_bug_is_no_failed_run(tiny, settings):
    def broken(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare(tiny, ["wanda"], [0.5], evaluate=broken, **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["wanda", "magic"]}, "'magic' does not exist: pass one of fast, balanced"),
        ({"methods": "wanda"}, "methods='wanda' must be a list"),
        ({"methods": []}, "at least one"),
        ({"sparsities": [0.5, 50]}, "for 50 % pass 0.5"),
        ({"sparsities": 0.5}, "sparsities=0.5 must be a list"),
        ({"sparsities": ["2:4"], "allocation": "owl"}, "fixes every layer's sparsity"),
        ({"sparsity": 0.5}, "sparsity is what compare varies"),
        ({"num_sample": 3}, "no 'num_sample'"),
        ({"methods": {"a": {"method": "wanda", "seed": 1}}}, "has its own seed"),
        ({"dataset": None}, "method='wanda' needs calibration data"),
        ({"model": "a/path"}, "model is a str: pass a model, or a function"),
        ({"model": lambda: "a/path"}, "gave a str"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    tiny, settings, held_out, monkeypatch, changes, words
):
    monkeypatch.setattr("hf_sparse.evaluation.comparison.run.prune_in_place", pytest.fail)
    given = {"model": tiny, "methods": ["wanda"], "sparsities": [0.5], **settings, **changes}
    with pytest.raises(ConfigError, match=words):
        compare(eval_dataset=held_out, **given)


def test_what_can_not_be_evaluated_is_found_before_anything_runs(
    tiny, settings, held_out, monkeypatch
):
    monkeypatch.setattr("hf_sparse.evaluation.comparison.run.prune_in_place", pytest.fail)
    given = (tiny, ["wanda"], [0.5])
    for more in ({}, {"eval_dataset": held_out, "evaluate": math.sin}):
        with pytest.raises(EvaluationError, match="either eval_dataset"):
            compare(*given, **more, **settings)
    with pytest.raises(EvaluationError, match="LlamaModel is no causal language model"):
        compare(tiny.model, ["wanda"], [0.5], held_out, **settings)
    with pytest.raises(EvaluationError, match="gave a str: it has to give a number"):
        compare(*given, evaluate=lambda model: "good", **settings)
    with pytest.raises(CalibrationError, match="empty"):
        compare(*given, held_out, **(settings | {"dataset": []}))


def test_a_sparse_model_is_refused(tiny, settings, held_out):
    prune(tiny, SparseConfig(method="magnitude"))
    with pytest.raises(ConfigError, match="quantised with 'hf_sparse' already"):
        compare(tiny, ["wanda"], [0.5], held_out, **settings)


# --- the example ----------------------------------------------------------------------------


def test_the_example_runs(short_examples, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    data = short_examples / "data"
    arguments = [
        str(short_examples / "models" / "tiny-llama-docs"),
        "--calibration", str(data / "calibration.txt"),
        "--evaluation", str(data / "evaluation.txt"), "--methods", "magnitude", "wanda",
        "--sparsities", "0.5", "2:4", "--num-samples", "2", "--evaluation-samples", "2",
        "--seq-len", "64", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *arguments])
    runpy.run_path(str(short_examples / "compare_methods.py"), run_name="__main__")
    logging.disable_progress_bar()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["dense", "0"], ["magnitude", "0.5"], ["magnitude", "2:4"], ["wanda", "0.5"],
        ["wanda", "2:4"],
    ]  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 3
