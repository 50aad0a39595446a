"""The commands from end to end, in this process, and what they say when something is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_sparse
from conftest import ROOT, save_with_tokenizer
from hf_sparse.config.recipes import RECIPES
from hf_sparse.evaluation import memory
from hf_sparse.solvers import SOLVERS
from hf_sparse_cli import main


@pytest.fixture
def fails(cli):
    """Runs a command line that has to fail; the sentence on stderr."""

    def run(*arguments):
        code, out, err = cli(*arguments)
        assert (code, out) == (1, "")
        (line,) = (line for line in err.splitlines() if line.startswith("Error: "))
        assert "Traceback" not in err
        return line.removeprefix("Error: ")

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """The same, pruned by magnitude."""
    config = hf_sparse.SparseConfig(method="magnitude", sparsity=0.75)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    folder = tmp_path_factory.mktemp("models") / "sparse"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


@pytest.fixture
def text(data_path):
    return data_path / "evaluation.txt"


# --- the program ----------------------------------------------------------------------------


def test_the_installed_program_is_this_one():
    project = (ROOT / "pyproject.toml").read_text()
    (found,) = re.findall(r'^hf-sparse = "(\w+):(\w+)"$', project, re.MULTILINE)
    assert getattr(import_module(found[0]), found[1]) is main


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["inspect", "SPARSE"]])
def test_help_and_inspect_load_neither_torch_nor_transformers(arguments, sparse):
    code = """
import sys
from hf_sparse_cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "transformers", "hf_sparse"} & set(sys.modules)), file=sys.stderr)
"""
    given = [str(sparse) if argument == "SPARSE" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_every_command_has_help_with_examples(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert "examples:" in out
    for name in (
        "methods",
        "prune",
        "eval",
        "compare",
        "inspect",
        "explain",
        "export",
        "merge",
        "serve",
    ):
        assert f"\n  {name} " in out
        code, help_text, _ = cli(name, "--help")
        assert code == 0
        assert "examples:\n    hf-sparse " in help_text
    code, help_text, _ = cli("bench", "--help")
    assert code == 0
    for name in ("layers", "model", "gpu"):
        assert f"\n  {name} " in help_text


def test_version_and_methods_are_told(cli):
    assert cli("--version")[1] == f"hf-sparse {hf_sparse.__version__}\n"
    code, out, _ = cli("methods")
    assert code == 0
    for name in (*RECIPES, *SOLVERS):
        assert f"\n  {name} " in out
    assert max(map(len, out.splitlines())) <= 100
    listed = json.loads(cli("methods", "--json")[1])["methods"]
    told = {method["name"]: method for method in listed}
    assert all(method["about"] for method in listed)
    assert told["fast"]["settings"] == {"method": "sparsegpt", "refit": 10}
    assert told["best"]["settings"]["target"] == "dense"
    assert "no data" in told["magnitude"]["costs"]
    assert "gradients" in told["balanced"]["costs"]


def test_the_options_of_a_command_are_in_groups(cli):
    _, out, _ = cli("prune", "--help")
    headings = [line for line in out.splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    assert headings == [
        "Arguments:", "What to prune:", "Data:", "Method:", "Mixtures of experts:", "Storage:",
        "Attention:", "Output:", "Model:", "From disk to disk:", "Other:",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "x", "--sparsty", "0.5"], "--sparsity"),
        (["prun"], "Did you mean 'prune'"),
        (["eval", "x", "--seqlen", "5"], "--seq-len"),
        (["bench", "layers", "--shape-s", "5"], "--shapes"),
    ],
)
def test_an_unknown_option_or_command_suggests_the_nearest(cli, arguments, words):
    code, _, err = cli(*arguments)
    assert code == 2
    assert words in err


def test_completion_offers_the_config_s_arguments():
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse_cli"],
        env=os.environ
        | {
            "_HF_SPARSE_COMPLETE": "complete_bash",
            "COMP_WORDS": "hf-sparse prune x --damp",
            "COMP_CWORD": "3",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--damping" in done.stdout


# --- what the commands do -------------------------------------------------------------------


def test_prune_saves_what_from_pretrained_would_have_made(cli, dense, tmp_path, data_path):
    config = tmp_path / "sparse.yaml"
    config.write_text("method: magnitude\nsparsity: 0.25\nnum_samples: 4\n")
    arguments = ["--method", "wanda", "--seq-len", 32, "--dataset", data_path / "calibration.txt"]
    code, out, _ = cli(
        "prune", dense, "--output", tmp_path / "out", "--config", config, *arguments, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert result["output"] == str(tmp_path / "out")
    assert result["pushed"] is None
    assert result["sparsity"] == pytest.approx(0.25, abs=0.01)
    assert result["data"]["count"] == 4

    python = AutoModelForCausalLM.from_pretrained(
        dense,
        quantization_config=hf_sparse.SparseConfig(
            method="wanda",
            sparsity=0.25,
            num_samples=4,
            seq_len=32,
            dataset=str(data_path / "calibration.txt"),
        ),
    )
    python.save_pretrained(tmp_path / "python")
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "python"))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("text").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "python", "sparse.yaml"]


def test_a_sparsity_per_layer_is_json_on_the_command_line(cli, dense, tmp_path):
    code, out, _ = cli(
        "prune", dense, "--output", tmp_path / "out", "--method", "magnitude",
        "--sparsity", '{"mlp": 0.5}', "--modules-to-not-convert", "gate_proj",
        "--modules-to-not-convert", "layers.1", "--json",
    )  # fmt: skip
    assert code == 0
    assert [layer["name"] for layer in json.loads(out)["layers"]] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_inspect_shows_layers_of_one_kind_in_a_line(cli, sparse):
    code, out, _ = cli("inspect", sparse)
    assert code == 0
    (line,) = (line for line in out.splitlines() if "up_proj" in line)
    cells = line.split()
    assert cells[:6] == ["model.layers.*.mlp.up_proj", "x2", "40x24", "bitmask", "F32", "0.7500"]
    assert "14 packed layers" in out.splitlines()[-1]
    code, out, _ = cli("inspect", sparse, "--layers")
    assert "model.layers.0.mlp.up_proj" in out
    code, out, _ = cli("inspect", sparse, "--json")
    values = json.loads(out)
    assert len(values["layers"]) == 14
    assert values["config"]["method"] == "magnitude"
    assert values["bytes_packed"] == sum(layer["bytes"] for layer in values["layers"])


def test_names_from_a_file_do_nothing_to_the_terminal(cli, sparse, tmp_path):
    shutil.copytree(sparse, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["method"] = "\x1b[2J\x1b]0;mine\x07"
    path.write_text(json.dumps(config))
    code, out, err = cli("inspect", tmp_path / "copy")
    assert code == 0
    assert "\\x1b[2J" in out
    code, more, err = cli("inspect", tmp_path / "\x1b[2J")
    assert code == 1
    assert not {*"\x1b\x07"} & {*(out + more + err)}


@pytest.mark.skipif(not memory.peak_resident(), reason="the system doesn't tell")
def test_inspect_takes_little_memory_on_a_hundred_thousand_tensors(tmp_path):
    names = [f"model.layers.{i // 8}.experts.{i % 8}.up_proj" for i in range(50_000)]
    header = {"__metadata__": {"hf_sparse": json.dumps({
        "version": 1, "layers": {name: {"format": "bitmask", "shape": [16, 16]} for name in names}
    })}}  # fmt: skip
    for i, name in enumerate(names):
        values, end = 288 * i, 288 * (i + 1)
        mask = {"dtype": "U8", "shape": [16, 2], "data_offsets": [values + 256, end]}
        header[f"{name}.weight_bitmask"] = mask
        offsets = [values, values + 256]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": [128], "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 288 * len(names))
    config = {"quantization_config": {"quant_method": "hf_sparse"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = """
import sys
from hf_sparse_cli import main
try:
    main(["inspect", sys.argv[1]])
finally:
    with open("/proc/self/status") as file:
        print(next(line.split()[1] for line in file if line.startswith("VmHWM")), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "x50000  16x16  bitmask  BF16    0.5000" in done.stdout
    assert "all 100000 tensors in 1 files, 14.40 MB" in done.stdout
    assert int(done.stderr.split()[-1]) * 1024 < 500e6


def test_explain_names_a_kernel_for_each_layer(cli, sparse):
    code, out, _ = cli("explain", sparse)
    assert code == 0
    assert "2 x model.layers.*.self_attn.k_proj" in out
    assert "over dense float32: " in out
    assert "model.layers.1.self_attn.k_proj" not in out
    code, out, _ = cli("explain", sparse, "--verbose", "--prefer", "memory")
    assert "model.layers.1.self_attn.k_proj" in out
    assert "not measured" in out
    code, out, _ = cli("explain", sparse, "--json", "--dtype", "float32")
    values = json.loads(out)
    assert len(values["layers"]) == 14
    assert {layer["kernel"] for layer in values["layers"]} <= {"tile", "dense", "reference"}
    assert values["bytes_dense"] == sum(layer["bytes_dense"] for layer in values["layers"])


def test_export_writes_a_checkpoint_without_a_trace_of_hf_sparse(cli, sparse, tmp_path):
    code, out, _ = cli(
        "export", sparse, "--format", "dense", "--output", tmp_path / "out", "--json"
    )
    assert code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads(out)["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "hf_sparse" not in (tmp_path / "out" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("text").input_ids
    model = AutoModelForCausalLM.from_pretrained(sparse)
    for name, module in model.named_modules():
        if isinstance(module, hf_sparse.SparseLinear):
            assert torch.equal(stored[f"{name}.weight"], module.weight)


def test_eval_measures_what_the_functions_measure(cli, sparse, dense, text):
    code, out, _ = cli(
        "eval", sparse, "--dataset", text, "--dense", dense, "--seq-len", 32, "--num-samples", 5,
        "--batch-size", 2, "--speed", "--json",
    )  # fmt: skip
    assert code == 0
    values = json.loads(out)
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    model, other = map(AutoModelForCausalLM.from_pretrained, (sparse, dense))
    expected = hf_sparse.perplexity(model, tokenizer, str(text), 32, num_samples=5)
    assert values["perplexity"]["tokens"] == 5 * 31
    assert values["perplexity"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    expected = hf_sparse.perplexity(other, tokenizer, str(text), 32, num_samples=5)
    assert values["dense_perplexity"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    agreed = hf_sparse.agreement(model, other, tokenizer, str(text), 32, num_samples=5)
    assert values["agreement"]["kl_divergence"] == pytest.approx(agreed.kl_divergence, abs=1e-6)
    assert values["speed"]["tokens_per_second"] > 0
    assert "tasks" not in values


def test_eval_prints_a_line_for_each_thing_that_was_asked_for(cli, sparse, text):
    code, out, _ = cli(
        "eval", sparse, "--dataset", text, "--seq-len", 32, "--stride", 16, "--num-samples", 2
    )
    assert code == 0
    (line,) = out.splitlines()
    assert line.startswith("perplexity ")
    assert "3 sliding windows, stride 16 of 32" in line


def compare_options(text, *more):
    data = ["--dataset", text, "--eval-dataset", text, "--num-samples", 4, "--seq-len", 32]
    return [*data, "--eval-samples", 3, *more]


def test_compare_writes_what_the_function_finds(cli, dense, text, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "compared"
    code, printed, _ = cli(
        "compare", dense, "--methods", "magnitude,wanda", "--sparsities", "0.5,2:4",
        *compare_options(text), "--bits", 8, "--output", out, "--json",
    )  # fmt: skip
    assert code == 0
    values = json.loads(printed)
    assert {path.name for path in out.iterdir()} == {
        "comparison.json", "comparison.md", "comparison.png",
    }  # fmt: skip
    assert json.loads((out / "comparison.json").read_text()) | {"output": str(out)} == values
    expected = hf_sparse.compare(
        AutoModelForCausalLM.from_pretrained(dense), ["magnitude", "wanda"], [0.5, "2:4"],
        str(text), eval_samples=3, dataset=str(text), num_samples=4, seq_len=32, bits=8,
    )  # fmt: skip
    figures = ("method", "setting", "score", "bytes_stored", "bytes_resident", "error")
    for point, found in zip(expected.points, values["points"], strict=True):
        assert [found[name] for name in figures] == [getattr(point, name) for name in figures]
    assert values["settings"]["bits"] == 8
    assert values["dense"] == expected.dense


def test_compare_leaves_the_plot_out_with_a_note_where_there_is_no_matplotlib(
    cli, dense, text, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "compared"
    options = ["--methods", "magnitude", "--sparsities", "0.5", *compare_options(text)]
    code, printed, said = cli("compare", dense, *options, "--output", out)
    assert code == 0
    assert "comparison.png is left out: it needs matplotlib, pip install matplotlib" in said
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["method", "dense", "magnitude"]
    assert lines[-1] == f"saved in {out}"
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.md"}


def test_bench_hands_its_options_on(cli, tmp_path):
    code, out, _ = cli(
        "bench", "layers", "--shapes", "128x192", "--sparsity", "0.5", "--rows", "1", "--cold-mb",
        "1", "--rounds", "1", "--seconds", "0", "--json", "--output", tmp_path / "bench",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "bench" / "results.json").read_text())


# --- mistakes -------------------------------------------------------------------------------


def test_models_that_are_none_are_refused_before_anything_is_loaded(fails, tmp_path, sparse):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{")
    output = ["--output", tmp_path / "out"]
    for command in (["prune"], ["explain"], ["inspect"], ["export"]):
        more = output if command[0] in ("prune", "export") else []
        assert "there is no folder ./nowhere" in fails(*command, "./nowhere", *more)
        assert "empty has no config.json" in fails(*command, tmp_path / "empty", *more)
        assert "file is a file: pass the model's folder" in fails(
            *command, tmp_path / "file", *more
        )
        assert "is not JSON" in fails(*command, tmp_path / "odd", *more)
    for adapter in ("./nowhere", "nowhere"):
        said = fails("merge", sparse, "--adapter", adapter, *output)
        assert f"there is no folder {adapter}" in said
    for command in (["prune"], ["explain"], ["inspect"], ["export"]):
        more = output if command[0] in ("prune", "export") else []
        said = fails(*command, "nobody/nothing", *more)
        assert "no folder nobody/nothing, and from the Hub: the Hub can't be reached" in said
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_is_no_sparse_one(fails, dense, tmp_path):
    for command in (["inspect", dense], ["explain", dense], ["export", dense, "--output", "x"]):
        assert "is dense, no sparse checkpoint: `hf-sparse prune` makes one" in fails(*command)


def test_a_sparse_checkpoint_is_not_pruned_again(fails, sparse, tmp_path):
    said = fails("prune", sparse, "--method", "magnitude", "--output", tmp_path / "out")
    assert "is sparse already: pass the dense model that it was made from" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "50"], "for 50 % pass 0.5"),
        (["--sparsity", "0.5"], "needs calibration data"),
        (["--method", "magic"], "'magic'"),
        (["--method", "magnitude", "--targets", "up_prok"], "near names: up_proj"),
        (["--method", "magnitude", "--dtype", "int8"], "--dtype int8 is not known"),
        (["--dataset", "missing.txt"], "missing.txt.*no such file"),
        (["--method", "magnitude", "--config", "none.yaml"], "none.yaml can't be read"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_write_nothing(
    fails, dense, tmp_path, arguments, words
):
    assert re.search(words, fails("prune", dense, "--output", tmp_path / "out", *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("methods", "sparsities", "more", "words"),
    [
        ("wanda,magic", "0.5", [], "'magic' does not exist: pass one of fast, balanced, best"),
        ("wanda", "0.5,half", [], "'half'"),
        ("wanda", "50", [], "sparsity=50.0 must be the fraction of zeros"),
        ("wanda", "0.5", ["--eval-dataset", "missing.txt"], "missing.txt.*no such file"),
        ("wanda", "0.5", ["--seq-len", 65], "longer than the 64 positions"),
    ],
)
def test_compare_refuses_mistakes_before_it_prunes_and_writes_nothing(
    fails, dense, text, tmp_path, monkeypatch, methods, sparsities, more, words
):
    monkeypatch.setattr("hf_sparse.evaluation.comparison.run.prune_in_place", pytest.fail)
    out = ["--no-plot", "--output", tmp_path / "out"]
    options = ["--methods", methods, "--sparsities", sparsities, *compare_options(text), *more]
    assert re.search(words, fails("compare", dense, *options, *out))
    assert list(tmp_path.iterdir()) == []


def test_compare_says_at_once_what_it_can_not_do(fails, dense, sparse, text, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_sparse, "compare", pytest.fail)
    options = ["--methods", "wanda", "--sparsities", "0.5", *compare_options(text)]
    said = fails("compare", sparse, *options, "--output", tmp_path / "out")
    assert "is sparse already: pass the dense model that it was made from" in said
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = fails("compare", dense, *options, "--plot", "--output", tmp_path / "out")
    assert "--plot needs matplotlib: pip install matplotlib" in said


def test_an_output_that_can_not_be_written_is_refused_before_the_work(fails, dense, tmp_path):
    (tmp_path / "file").write_text("precious")
    for output, words in (
        ("file", "is a file: pass a folder"),
        ("file/x", "nothing can be written"),
    ):
        said = fails("prune", dense, "--method", "magnitude", "--output", tmp_path / output)
        assert words in said
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
@pytest.mark.parametrize("command", ["prune", "export"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    fails, dense, sparse, tmp_path, monkeypatch, part, command
):
    from transformers import PreTrainedTokenizerBase, modeling_utils

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    where = (modeling_utils, "safe_save_file")
    if part == "tokenizer":
        where = (PreTrainedTokenizerBase, "save_pretrained")
    monkeypatch.setattr(*where, full)
    options = [dense, "--method", "magnitude"] if command == "prune" else [sparse]
    said = fails(command, *options, "--output", tmp_path / "new" / "out")
    assert "No space left on device" in said
    assert "out' failed, nothing was changed there" in said
    assert said.count("nothing was changed") == 1
    assert list(tmp_path.iterdir()) == []


def test_eval_says_what_is_missing(fails, sparse, dense, text):
    assert "nothing to measure: pass --dataset, --speed or --tasks" in fails("eval", sparse)
    said = fails("eval", sparse, "--speed", "--dense", dense)
    assert "--dense compares on text: pass --dataset" in said
    said = fails("eval", sparse, "--dataset", text, "--seq-len", 65)
    assert "at most the 64 positions" in said


def test_a_bench_that_fails_says_so_in_a_sentence(fails, tmp_path):
    (tmp_path / "file").touch()
    said = fails("bench", "layers", "--shapes", "128x192", "--sparsity", "0.5", "--rows", "1",
                 "--cold-mb", "1", "--rounds", "1", "--seconds", "0",
                 "--output", tmp_path / "file")  # fmt: skip
    assert "file is a file: pass a folder" in said


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="there is no folder"):
        main(["inspect", "./nowhere", "--debug"])


def test_an_unexpected_error_names_its_type_and_debug(fails, sparse, monkeypatch):
    def broken(model):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(hf_sparse, "explain", broken)
    assert fails("explain", sparse).startswith("ZeroDivisionError: division by zero (--debug")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()
