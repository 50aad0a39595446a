"""`hf-sparse report` from end to end, and what it says when something is wrong."""

import functools
import json
import shutil

import pytest
from hub_client import Client
from hub_server import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from conftest import ROOT, save_with_tokenizer
from hf_sparse_cli import main
from hf_sparse_cli.commands import report as command

PUSH = """
import sys
import hf_sparse
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/pruned")
"""
MAKE = """
import sys
from hf_sparse_cli import main

main(["report", sys.argv[1], "--output", sys.argv[2]])
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_with_tokenizer(
        tmp_path_factory.mktemp("models") / "dense", max_position_embeddings=192
    )


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """The same, pruned."""
    config = hf_sparse.SparseConfig(method="magnitude", sparsity=0.75)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    folder = tmp_path_factory.mktemp("models") / "sparse"
    model.save_pretrained(folder, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


@pytest.fixture
def report(cli):
    """Exit code, stdout and stderr of `hf-sparse report`."""
    return functools.partial(cli, "report")


def test_a_page_is_made_without_loading_the_model(report, sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *args: pytest.fail("it was loaded"))
    out = tmp_path / "pages" / "report.html"
    code, said, _ = report(sparse, "--output", out)
    assert code == 0
    assert said.splitlines()[-1] == f"written to {out}"
    model = AutoModelForCausalLM.from_pretrained(sparse)
    hf_sparse.write_report(model.hf_quantizer.report, tmp_path / "python.html", masks=model)
    assert out.read_text(encoding="utf-8") == (tmp_path / "python.html").read_text("utf-8")
    assert report(sparse, "--output", out, "--no-masks", "--overwrite")[0] == 0
    assert "there are no masks in it" in out.read_text(encoding="utf-8")


def test_json_holds_the_report_and_what_was_measured(report, sparse, dense, tmp_path):
    text = ROOT / "examples" / "data" / "evaluation.txt"
    arguments = ["--dataset", text, "--seq-len", 32, "--num-samples", 2, "--prompt", "A table is"]
    out = tmp_path / "report.html"
    code, said, _ = report(sparse, "--output", out, "--dense", dense, *arguments, "--json")
    assert code == 0
    values = json.loads(said)
    assert values["sparsity"] == 0.75
    assert values["output"] == str(out)
    measured = values["evaluation"]
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    for folder, name in ((sparse, "perplexity"), (dense, "dense_perplexity")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = hf_sparse.perplexity(model, tokenizer, str(text), 32, num_samples=2)
        assert measured[name]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert [pair["prompt"] for pair in measured["texts"]] == ["A table is"]
    assert len(measured["agreement"]["depth"]) == 3
    page = out.read_text(encoding="utf-8")
    assert f"{measured['dense_perplexity']['perplexity']:.3f}" in page
    assert "depth-chart" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dense", "somewhere"], "--dense measures: pass --dataset, too"),
        (["--prompt", "a"], "--prompt measures: pass --dataset, too"),
        (["--dense", "./none", "--dataset", "x.txt"], "there is no folder ./none"),
        (["--dtype", "int8"], "--dtype int8 is not known"),
        (["--dataset", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(report, sparse, tmp_path, arguments, words):
    code, said, errors = report(sparse, "--output", tmp_path / "r.html", *arguments)
    assert (code, said) == (1, "")
    assert words in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_is_no_checkpoint_with_a_report(report, sparse, dense, tmp_path):
    out = tmp_path / "r.html"
    assert "is dense, no sparse checkpoint" in report(dense, "--output", out)[2]
    copy = tmp_path / "copy"
    shutil.copytree(sparse, copy)
    (copy / "pruning_report.json").write_text('{"layers": [{}]}')
    said = report(copy, "--output", out)[2]
    assert "pruning_report.json, layers, 0: name is missing" in said
    (copy / "pruning_report.json").unlink()
    assert "has no pruning_report.json" in report(copy, "--output", out)[2]
    assert "is a folder: pass a file" in report(sparse, "--output", tmp_path)[2]
    assert not out.exists()


def test_a_checkpoint_on_the_hub_is_fetched(sparse, tmp_path):
    with serve() as hub:
        client = Client(hub, tmp_path / "home")
        client.check(PUSH, sparse)
        client.check(MAKE, "me/pruned", tmp_path / "hub.html")
        assert [path for path in hub.repos["me/pruned"].files() if path == "pruning_report.json"]
    with pytest.raises(SystemExit):
        main(["report", str(sparse), "--output", str(tmp_path / "folder.html")])
    assert (tmp_path / "hub.html").read_bytes() == (tmp_path / "folder.html").read_bytes()
