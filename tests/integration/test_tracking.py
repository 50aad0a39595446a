"""Reports in the real TensorBoard and the real trackio, where they are installed."""

import importlib.util
import json
import os
import sys
import types

import fresh
import pytest

import hf_sparse
from hf_sparse import SparseConfig

MAGNITUDE = SparseConfig(method="magnitude", sparsity=0.5)


def test_tensorboard_gets_totals_and_layers_over_depth(tiny, token_ids, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    report = hf_sparse.prune(tiny, SparseConfig(dataset=list(token_ids)))
    with SummaryWriter(str(tmp_path)) as writer:
        report.log_to(writer)
    written = EventAccumulator(str(tmp_path)).Reload()
    (total,) = written.Scalars("pruning/sparsity")
    assert total.value == pytest.approx(report.sparsity)
    errors = written.Scalars("pruning/layers/relative_error")
    assert [event.step for event in errors] == list(range(14))
    assert [event.value for event in errors] == pytest.approx(
        [layer.relative_error for layer in report.layers]
    )


LOG = """
import json, sys
import hf_sparse
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
config = hf_sparse.SparseConfig(method="magnitude", sparsity=0.25, targets=["mlp"])
hf_sparse.prune(model, config)
assert not {"trackio", "tensorboard"} & set(sys.modules)
model.dequantize()

import trackio
from trackio.sqlite_storage import SQLiteStorage

trackio.init(project="pruned", name="one", embed=False, auto_log_gpu=False, auto_log_cpu=False)
hf_sparse.prune(model, config)
trackio.finish()
print("logged", json.dumps(SQLiteStorage.get_logs("pruned", "one")))
"""


def test_the_current_trackio_run_gets_the_report_and_nothing_is_imported_for_it(tmp_path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed: pip install 'hf_sparse[tracking]'")
    env = os.environ | {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = fresh.run(LOG, env=env)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("logged ")]
    (logged,) = json.loads(line.removeprefix("logged "))
    assert logged["pruning/sparsity"] == 0.25
    assert logged["pruning/bytes_before"] == 3 * 16 * 16 * 4
    rows = logged["pruning/layers"]["_value"]
    assert [row["name"] for row in rows] == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]


def run_of(logged):
    """A trackio whose current run keeps what is logged."""
    run = types.SimpleNamespace(log=logged)
    current = types.SimpleNamespace(get=lambda: run)
    return types.SimpleNamespace(
        Table=lambda data: data, context_vars=types.SimpleNamespace(current_run=current)
    )


def test_a_tracker_that_fails_does_not_cost_the_pruned_model(tiny, monkeypatch):
    def refuse(values):
        raise RuntimeError("no server")

    said = []
    monkeypatch.setitem(sys.modules, "trackio", run_of(refuse))
    monkeypatch.setattr(
        hf_sparse.pruning.tracking.logger, "warning", lambda *args: said.append(args)
    )
    assert hf_sparse.prune(tiny, MAGNITUDE).sparsity == 0.5
    assert said == [("the report was not logged to trackio: %s", "no server")]
