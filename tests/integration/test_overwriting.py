"""Nothing of the user's is overwritten unasked, by any command that writes."""

import json
import os

import pytest
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import ROOT, save_with_tokenizer

TEXT = str(ROOT / "examples" / "data" / "evaluation.txt")
OLD = ROOT / "tests" / "data" / "bitmask-0.8.1"
BENCH = ("bench", "layers", "--shapes", "32x32", "--sparsity", "0.5", "--rows", "1", "--cold-mb",
         "1", "--rounds", "1", "--seconds", "0")  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, and the same sparse, in folders of these names."""
    folder = tmp_path_factory.mktemp("models")
    save_with_tokenizer(folder / "dense", num_hidden_layers=1)
    config = hf_sparse.SparseConfig(method="magnitude", sparsity=0.75)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "sparse")
    return folder


@pytest.fixture
def commands(models, tmp_path):
    """Each command that writes a folder, without its --output, and what it reads."""
    adapter = models / "adapter"
    compared = ["--methods", "magnitude", "--sparsities", "0.5", "--eval-dataset", TEXT,
                "--eval-samples", "1", "--seq-len", "16", "--no-plot"]  # fmt: skip
    return {
        "prune": (["prune", models / "dense", "--method", "magnitude"], models / "dense"),
        "export": (["export", models / "sparse"], models / "sparse"),
        "convert": (["convert", OLD], OLD),
        "compare": (["compare", models / "dense", *compared], models / "dense"),
        "merge": (["merge", models / "sparse", "--adapter", adapter], models / "sparse"),
        "bench": (list(BENCH), None),
    }


NAMES = ("prune", "export", "convert", "compare", "merge", "bench")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_not_empty_needs_overwrite(cli, commands, tmp_path, name):
    command, _ = commands[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    code, _, said = cli(*command, "--output", tmp_path / "out")
    assert code == 1
    assert "out is not empty: pass another folder, or --overwrite" in said
    assert contents(tmp_path / "out") == {"mine.txt": b"precious"}


@pytest.mark.parametrize("name", ["prune", "export", "compare"])
def test_with_overwrite_files_of_other_names_stay(cli, commands, tmp_path, name):
    command, _ = commands[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    code, _, said = cli(*command, "--output", tmp_path / "out", "--overwrite")
    assert code == 0, said
    found = contents(tmp_path / "out")
    assert found.pop("mine.txt") == b"precious"
    assert found


@pytest.mark.parametrize("way", ["itself", "through a link", "with a slash", "relative"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bench"])
def test_what_a_command_reads_is_never_its_output(cli, commands, tmp_path, monkeypatch, name, way):
    command, source = commands[name]
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    output = {"itself": source, "through a link": tmp_path / "link", "with a slash": f"{source}/",
              "relative": "."}[way]  # fmt: skip
    code, _, said = cli(*command, "--output", output, "--overwrite")
    assert code == 1
    assert "itself: pass another folder" in said
    assert contents(source) == before


def test_a_page_is_not_written_over_a_file_unasked(cli, models, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("precious")
    code, _, said = cli("report", models / "sparse", "--output", page)
    assert code == 1
    assert "exists already: pass another name, or --overwrite" in said
    assert page.read_text() == "precious"
    assert cli("report", models / "sparse", "--output", page, "--overwrite")[0] == 0
    assert "<html" in page.read_text()


def test_a_page_never_takes_the_place_of_another_kind_of_file(cli, models):
    weights = models / "sparse" / "model.safetensors"
    before = weights.read_bytes()
    code, _, said = cli("report", models / "sparse", "--output", weights, "--overwrite")
    assert code == 1
    assert "is no .html file: pass another name" in said
    assert weights.read_bytes() == before


def test_bench_writes_nothing_unless_told_where(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli(*BENCH)
    assert code == 0
    assert "| 32x32 |" in out
    assert os.listdir(tmp_path) == []


def test_a_comparison_without_a_plot_removes_only_the_plot_of_an_older_one(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models / "dense")
    found = hf_sparse.compare(model, ["magnitude"], [0.5], evaluate=lambda model: 1.0)
    (tmp_path / "comparison.png").write_text("mine")
    found.save(tmp_path, plot=False)
    assert (tmp_path / "comparison.png").read_text() == "mine"
    found.save(tmp_path, plot=False)  # beside a comparison it is taken for that one's
    assert not (tmp_path / "comparison.png").exists()


def test_save_pretrained_replaces_a_checkpoint_and_leaves_all_other_files(models, tmp_path):
    for name in ("mine.txt", "other.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("precious")
    AutoModelForCausalLM.from_pretrained(models / "dense").save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(models / "sparse").save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    for name in ("mine.txt", "other.safetensors", "pytorch_model.bin"):
        assert (tmp_path / name).read_text() == "precious"
