"""`bench gpu` on a CPU: all of it on tiny shapes through Triton's interpreter.

Only the clock of CUDA graphs and torch's own 2:4 tensors are made up.
"""

import json
import time

import pytest
import torch

from hf_sparse_cli.bench import gpu, gpu_table
from hf_sparse_cli.failures import Failure


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Tiny shapes on the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run `hf-sparse bench gpu`")

    def seconds(*alternatives):
        found = []
        for calls in alternatives:
            started = time.perf_counter()
            for call in calls:
                call()
            found.append((time.perf_counter() - started) / len(calls))
        return found

    class Semi:
        def __init__(self, dense):
            self.own, self.nbytes = dense, dense.nbytes // 2

        of = classmethod(lambda cls, dense: cls(dense))

        def copy(self):
            return self

        def __call__(self, x):
            return torch.nn.functional.linear(x, self.own)

    shapes = ((24, 64),)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 97,
    }
    for name, value in {
        "DEVICE": "cpu", "COPIED_BYTES": 1 << 20, "DECODE_SHAPES": shapes, "PREFILL_SHAPES": shapes,
        "PREFILL_TOKENS": 70, "SOLVED": (24, 256), "NEW_TOKENS": 3, "CALIBRATION": (4, 64),
        "LLAMA_8B": small, "LLAMA_7B": small, "FEW_BLOCKS": 1, "VOCABULARY": 97,
        "SemiStructuredWeight": Semi,
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.timing, "graph_seconds", seconds)
    monkeypatch.setattr(gpu.timing, "COLD_BYTES", 1 << 12)
    monkeypatch.setattr(gpu.timing, "gpu", lambda: "NVIDIA Made Up")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own modules
def test_every_part_runs_and_is_written_as_soon_as_it_has(tiny, monkeypatch):
    seen = []
    for found in gpu.measure(tuple(gpu.PARTS), 2):
        gpu_table.write(tiny, found)
        seen.append(set(json.loads((tiny / "gpu.json").read_text())) & set(gpu.PARTS))
    assert seen == [set(list(gpu.PARTS)[: n + 1]) for n in range(len(gpu.PARTS))]
    # Per shape and sparsity: 1 and 4 tokens packed, 16 in two ways.
    assert len(found["decode"]) == 3 * 4
    assert all(point["difference"] < 1e-2 for point in found["decode"] + found["prefill"])
    assert {point["tokens"] for point in found["prefill"]} >= {1, 16, 70}
    assert all(point["error"] > 0 for point in found["solve"])
    assert found["model"]["sparse"]["weight_bytes"] < found["model"]["dense"]["weight_bytes"]
    assert found["prune"]["minutes_of_32_blocks"] == found["prune"]["seconds"] * 32 / 60


def test_a_product_that_is_wrong_ends_it(tiny, monkeypatch):
    monkeypatch.setitem(gpu.WAYS, "packed", lambda x, weight: x.new_zeros(len(x), weight.shape[0]))
    with pytest.raises(RuntimeError, match=r"packed.* is off by"):
        next(gpu.measure(("decode",), 1))


def test_without_a_gpu_it_says_that_it_needs_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Failure, match="CUDA GPU"):
        next(gpu.measure(("decode",), 1))


def test_the_table_has_a_row_for_each_product(tmp_path):
    point = gpu.ProductPoint("packed", (8, 16), 0.5, 1, 1e-6, 2e-6, 2.0, 0.6, 0.7, 1e-3)
    found = {"machine": "GPU", "copy_bandwidth": 4e12, "decode": [vars(point)], "solve": [{"a": 1}]}
    text = gpu_table.write(tmp_path, found)
    assert "| packed | 8x16 | 50% | 1 | 1.0 | 2.0 | 2.00 | 0.600 | 0.70 |" in text
    assert "4.00 TB/s" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["solve"] == [{"a": 1}]
