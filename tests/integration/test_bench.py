"""The benchmark runs and writes its files; what it measures is nobody's business here."""

import json
import re

import fresh
import pytest
import torch

from hf_sparse_cli.bench import endtoend, gpu, layers


@pytest.fixture
def bench(cli, tmp_path):
    """The results that a benchmark writes, which are those that it prints."""

    def run(*arguments):
        code, out, err = cli("bench", *arguments, "--threads", "1", "--output", tmp_path)
        assert code == 0, err
        assert (tmp_path / "results.md").read_text() == out
        results = json.loads((tmp_path / "results.json").read_text())
        assert "torch" in results["machine"]
        assert results["machine"].split(",")[0] in out
        return results

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_layers_are_measured_against_every_dense_rival(bench):
    results = bench(
        "layers", "--shapes", "96x208,176x120", "--sparsity", "0.5,0.8", "--rows", "1,5",
        "--values", "bf16,int8,int4", "--group-size", "16", "--cold-mb", "1", "--rounds", "5",
        "--seconds", "0",
    )  # fmt: skip
    points = results["layers"]
    assert len(points) == 2 * 2 * 2 * 3
    for point in points:
        assert {"torch fp32", "torch bf16"} <= set(point["ratios"])
        assert all(ratio > 0 for ratio in point["ratios"].values())
        assert point["rounds"] == 5
        assert point["difference"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("layers", "--values", "int3"), "'int3' is not one of fp32, bf16, fp16, int8, int4"),
        (("layers", "--group-size", "5"), "5 is no group size: pass an even number"),
        (("layers", "--sparsity", "50"), "50 is no fraction of zeros"),
        (("layers", "--sparsity", "half"), "could not convert string to float: 'half'"),
        (("layers", "--shapes", "64"), "'64' is no shape: pass OUTxIN"),
        (("layers", "--rows", "1,0"), "'0' is no count"),
        (("layers", "--threads", "two"), "'two' is no count"),
        (("layers", "--path", "sse"), "'sse' is not one of"),
        (("layers", "--valeus", "int8"), "--values"),
        (("model", "--presets", "big"), "'big' is not one of 135m, 1b, 1.1b, tiny"),
        (("gpu", "--parts", "decode,all"), "'all' is not one of decode, prefill"),
    ],
)
def test_mistakes_end_in_one_line_that_says_what_is_known(arguments, words, cli):
    code, out, err = cli("bench", *arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("layers", "values", layers.VALUES),
        ("model", "presets", endtoend.PRESETS),
        ("model", "dtypes", endtoend.DTYPES),
        ("gpu", "parts", gpu.PARTS),
    ],
)
def test_help_names_all_that_an_option_takes(command, option, known, cli):
    _, text, _ = cli("bench", command, "--help")
    (names,) = re.findall(rf"--{option} .*?any of\s+([\w.,\s]+?)\.\s", text, re.DOTALL)
    assert "".join(names.split()).split(",") == list(known)


def test_figures_alone_are_printed_as_json(cli, tmp_path):
    arguments = ("--shapes", "96x208", "--sparsity", "0.5", "--rows", "1", "--cold-mb", "1")
    settings = ("--rounds", "1", "--seconds", "0", "--output", tmp_path, "--json")
    code, out, _ = cli("bench", "layers", *arguments, *settings)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "results.json").read_text())


def test_a_model_is_measured_end_to_end(bench, monkeypatch):
    def forked(command, **_):
        _, _, module, *arguments = command
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
        return fresh.run(code, *arguments, imported=fresh.LOADED)

    monkeypatch.setattr(endtoend.subprocess, "run", forked)
    results = bench("model", "--presets", "tiny", "--prompt", "8", "--tokens", "2", "--rounds", "1")
    assert [point["dtype"] for point in results["speed"]] == ["fp32", "bf16"]
    for point in results["speed"]:
        assert point["decode_ratio"] > 0
        assert point["prefill_ratio"] > 0
        assert point["difference"] < 0.1
        assert point["weight_bytes"]["sparse"] > 0
    (memory,) = results["memory"]
    assert memory["loaded"]["dense"] >= memory["started"]["dense"]
