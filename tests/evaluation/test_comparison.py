"""The result of a comparison: table, JSON, files and plot."""

import dataclasses
import json
import math
import re
import sys

import pytest

from hf_sparse import Comparison, ComparisonPoint, Environment, EvaluationError, SaveError
from hf_sparse.core.data_record import DataRecord


def point(method="wanda", setting=0.5, **changes):
    values = {
        "sparsity": 0.5,
        "score": 12.3456,
        "seconds": 7.25,
        "bytes_dense": 4_000_000,
        "bytes_stored": 2_250_000,
        "bytes_resident": 3_000_000,
    }
    return ComparisonPoint(method, setting, **(values | changes))


FAILED = ComparisonPoint("obc", 0.6, error="layer a.b: too | wide")


def comparison(*points, **changes):
    values = {
        "model": "some/model",
        "measure": "perplexity",
        "dense": 10.0,
        "points": points or (point(), point(setting="2:4", score=13.0), FAILED),
        "settings": {"num_samples": 4},
        "methods": {"wanda": {"method": "wanda"}, "obc": {"method": "obc"}},
        "data": DataRecord("calibration.txt", "ab", 4, 64),
        "evaluation": None,
        "environment": Environment("a processor", 2, 1, "avx2", "cpu", "Linux x86_64"),
    }
    return Comparison(**(values | changes))


def test_the_text_has_a_line_a_run_then_the_errors_then_what_it_was_measured_on():
    heading, dense, first, second, failed, error, made = str(comparison()).splitlines()
    assert heading.split()[:4] == ["method", "sparsity", "perplexity", "seconds"]
    assert dense.split()[:3] == ["dense", "0", "10.000"]
    assert first.split() == ["wanda", "0.5", "12.346", "7.2", "2.25", "0.562", "3.00", "0.750"]
    assert second.split()[:3] == ["wanda", "2:4", "13.000"]
    assert failed.split() == ["obc", "0.6", "failed", *["-"] * 5]
    assert error == "obc, 0.6: layer a.b: too | wide"
    assert made.startswith("some/model; calibrated on 4 samples, 64 tokens of calibration.txt; a ")
    ends = ((dense, "10.000"), (first, "12.346"), (failed, "failed"))
    assert len({line.index(cell) + len(cell) for line, cell in ends}) == 1


def test_markdown_has_one_table_and_lists_the_errors():
    table, errors, made = comparison().markdown().rstrip("\n").split("\n\n")
    rows = table.splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[1].startswith("| --- | ---: |")
    assert rows[3].startswith("| wanda | 0.5 | 12.346 |")
    assert errors == "- obc, 0.6\\: layer a.b\\: too \\| wide"
    assert made.startswith("some/model; ")
    assert "\n- " not in comparison(point()).markdown()


def test_words_from_elsewhere_break_neither_the_table_nor_a_terminal():
    label = "a | b\n# c <d> [e](https://f) \x1b[31m"
    failed = ComparisonPoint(label, 0.6, error=label)
    found = comparison(point(label), failed, model=label)
    table, errors, made = found.markdown().rstrip("\n").split("\n\n")
    assert len(table.splitlines()) == 5
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    for text in (table, errors, made):
        assert not re.search(r"<|\x1b|(?<!\\)\]\(", text)
    assert len(str(found).splitlines()) == 6
    assert "\x1b" not in str(found)


def test_a_label_with_dollars_is_drawn_as_it_is(tmp_path):
    pytest.importorskip("matplotlib")
    comparison(point(r"$\frac$ of $x$")).save(tmp_path)
    assert (tmp_path / "comparison.png").exists()


def test_json_holds_every_field_and_no_number_that_json_does_not_know():
    result = comparison(point(score=math.inf), FAILED, dense=math.nan)
    content = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert set(content) == {field.name for field in dataclasses.fields(Comparison)}
    assert (content["dense"], content["points"][0]["score"]) == (None, None)
    assert content["points"][0]["bytes_stored"] == 2_250_000
    assert content["points"][1]["error"] == FAILED.error
    assert content["data"]["digest"] == "ab"
    assert content["methods"]["wanda"] == {"method": "wanda"}


def test_a_run_that_pruned_nothing_has_no_shares():
    row = point(setting=0.0, bytes_dense=0, bytes_stored=0, bytes_resident=0)
    assert row.share(row.bytes_stored) is None
    assert str(comparison(row)).splitlines()[2].split()[4:] == ["0.00", "-", "0.00", "-"]


def test_the_plot_joins_a_methods_fractions_and_leaves_patterns_and_failures_apart():
    pytest.importorskip("matplotlib")
    points = (
        point(setting=0.6, sparsity=0.6, score=15.0),
        point(score=12.0),
        point(setting="2:4", score=13.0),
        point(setting=0.9, sparsity=0.9, score=math.inf),
        FAILED,
    )
    score, seconds, size = comparison(*points).plot().axes
    assert [axis.get_ylabel().split()[0] for axis in (score, seconds, size)] == [
        "perplexity", "seconds", "bytes",
    ]  # fmt: skip
    line, pattern = score.get_lines()[:2]
    assert [list(values) for values in line.get_data()] == [[0.5, 0.6], [12.0, 15.0]]
    assert [list(values) for values in pattern.get_data()] == [[0.5], [13.0]]
    assert [text.get_text() for text in score.texts] == ["2:4"]
    assert list(score.get_lines()[-1].get_ydata()) == [10.0, 10.0]
    assert list(size.get_lines()[0].get_ydata()) == [0.5625, 0.5625]


def test_saving_writes_table_json_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    result = comparison()
    result.save(tmp_path / "out")
    result.save(tmp_path / "out")
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"comparison.md", "comparison.json", "comparison.png"}
    assert files["comparison.md"].read_text() == result.markdown()
    assert json.loads(files["comparison.json"].read_text()) == result.to_dict()
    assert files["comparison.png"].read_bytes().startswith(b"\x89PNG")
    result.save(tmp_path / "out", plot=False)
    assert not files["comparison.png"].exists()


def test_a_plot_that_fails_leaves_no_file(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(SaveError, match="nothing was changed"):
        comparison().save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_plot_is_an_error_and_the_rest_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (comparison().plot, lambda: comparison().save(tmp_path / "out")):
        with pytest.raises(EvaluationError, match=r"pip install matplotlib"):
            draw()
    assert list(tmp_path.iterdir()) == []
    comparison().save(tmp_path / "out", plot=False)
    assert len(list((tmp_path / "out").iterdir())) == 2
