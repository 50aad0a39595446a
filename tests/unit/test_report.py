"""The report adds up, turns into JSON and reads well."""

import json

import pytest

from hf_sparse.calibration.data import DataRecord
from hf_sparse.report import LayerReport, PruningReport


def layer(name: str = "layers.0.q_proj", **changes) -> LayerReport:
    values = {
        "name": name,
        "shape": (4, 10),
        "pattern": "unstructured",
        "format": "bitmask",
        "zeros": 20,
        "sparsity": 0.5,
        "relative_error": 0.123456,
        "tokens": 77,
        "seconds": 0.5,
        "bytes_before": 160,
        "bytes_after": 88,
        "bytes_resident": 90,
        "kernel": "t16",
    }
    return LayerReport(**(values | changes))


def two_layers() -> PruningReport:
    layers = (
        layer(),
        layer(
            "layers.0.down",
            shape=(10, 16),
            zeros=120,
            sparsity=0.75,
            relative_error=None,
            tokens=None,
            bytes_before=640,
            bytes_after=184,
            bytes_resident=640,
            kernel="dense",
            notes=("damping raised to 0.1",),
        ),
    )
    dense = {"lm_head": "it belongs to the output head"}
    return PruningReport(layers, dense, DataRecord("calibration.txt", "ab12", 8, 1024), 2.25)


def test_totals_weigh_each_layer_by_its_size():
    report = two_layers()
    assert report.sparsity == pytest.approx(140 / 200)
    assert report.bytes_before == 800
    assert report.bytes_after == 272


def test_json_holds_every_field_and_the_totals():
    report = two_layers()
    content = json.loads(report.to_json())
    assert content["sparsity"] == pytest.approx(0.7)
    assert content["bytes_before"] == 800
    assert content["bytes_after"] == 272
    assert content["seconds"] == 2.25
    assert content["left_dense"] == {"lm_head": "it belongs to the output head"}
    assert content["data"] == {
        "source": "calibration.txt",
        "digest": "ab12",
        "count": 8,
        "tokens": 1024,
    }
    assert content["layers"][0] == {
        "name": "layers.0.q_proj",
        "shape": [4, 10],
        "pattern": "unstructured",
        "format": "bitmask",
        "zeros": 20,
        "sparsity": 0.5,
        "relative_error": 0.123456,
        "tokens": 77,
        "seconds": 0.5,
        "bytes_before": 160,
        "bytes_after": 88,
        "bytes_resident": 90,
        "kernel": "t16",
        "notes": [],
    }
    assert content["layers"][1]["relative_error"] is None
    assert content["layers"][1]["notes"] == ["damping raised to 0.1"]


def test_the_summary_names_layers_sparsity_time_and_bytes():
    summary = two_layers().summary()
    assert "2 layers to sparsity 0.7000" in summary
    assert "2.2 s" in summary
    assert "0.34 of" in summary  # 272 / 800
    assert summary.endswith("1 stay dense")


def test_the_table_has_one_line_a_layer_then_its_notes_then_the_summary():
    lines = str(two_layers()).splitlines()
    assert [word in lines[0] for word in ("layer", "sparsity", "rel. error", "bytes")] == [True] * 4
    assert lines[1].split() == [
        "layers.0.q_proj",
        "0.5000",
        "0.1235",
        "bitmask",
        *["160", "->", "88"],
    ]
    assert lines[2].split() == ["layers.0.down", "0.7500", "-", "bitmask", *["640", "->", "184"]]
    assert lines[3].strip() == "note: damping raised to 0.1"
    assert lines[4] == two_layers().summary()
    assert lines[1].index("0.5000") == lines[2].index("0.7500")


def test_a_layer_in_brief_has_name_sparsity_and_the_error_if_there_is_one():
    assert layer().brief() == "layers.0.q_proj, sparsity 0.500, error 0.123"
    assert layer(relative_error=None).brief() == "layers.0.q_proj, sparsity 0.500"


def test_an_empty_report_says_that_nothing_was_pruned():
    report = PruningReport(())
    assert report.sparsity == 0.0
    assert (report.bytes_before, report.bytes_after) == (0, 0)
    assert report.summary() == "no layer was pruned"
    assert str(report).endswith("no layer was pruned")
    assert json.loads(report.to_json())["data"] is None


def test_reports_are_frozen():
    with pytest.raises(AttributeError):
        layer().zeros = 3
    with pytest.raises(AttributeError):
        two_layers().seconds = 0.0
