"""The benchmark runs and writes its files; what it measures is nobody's business here."""

import json
import os
import subprocess
import sys

import pytest

from hf_sparse_cli.bench.__main__ import main


def bench(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse_cli.bench", *arguments, "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "results.md").read_text() == done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert "torch" in results["machine"]
    assert results["machine"].split(",")[0] in done.stdout
    return results


def test_layers_are_measured_against_every_dense_rival(tmp_path):
    results = bench(
        tmp_path, "layers", "--shapes", "64x96,48x40", "--sparsity", "0.5,0.8", "--rows", "1,5",
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
        (("layers", "--path", "sse"), "invalid choice: 'sse'"),
        (("model", "--presets", "big"), "'big' is not one of 135m, 1b, 1.1b, tiny"),
    ],
)
def test_mistakes_end_in_one_line_that_says_what_is_known(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err


def test_a_model_is_measured_end_to_end(tmp_path):
    results = bench(tmp_path, "model", "--presets", "tiny", "--prompt", "8", "--tokens", "2")
    assert [point["dtype"] for point in results["speed"]] == ["fp32", "bf16"]
    for point in results["speed"]:
        assert point["decode_ratio"] > 0
        assert point["prefill_ratio"] > 0
        assert point["difference"] < 0.1
        assert point["weight_bytes"]["sparse"] > 0
    (memory,) = results["memory"]
    assert memory["loaded"]["dense"] >= memory["started"]["dense"]
