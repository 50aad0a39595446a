"""The report adds up, turns into JSON and reads well."""

import json
import sys

import pytest
import torch

import hf_sparse
from conftest import LAYER
from conftest import layer_report as layer
from hf_sparse import CheckpointError, Environment, PackageError, SparseConfig
from hf_sparse.core.data_record import DataRecord
from hf_sparse.pruning.report import PruningReport


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
    return PruningReport(
        layers,
        {"lm_head": "it belongs to the output head"},
        DataRecord("calibration.txt", "ab12", 8, 1024),
        2.25,
        block_seconds={"layers.0": 1.5},
        model="me/tiny",
        config={"method": "wanda", "sparsity": [["mlp", 0.6]], "seed": 3},
        environment=Environment("A CPU", 8, 4, "avx2", "cpu", "Linux", {"torch": "2.13.0"}),
        date="2026-11-21T10:00:00+00:00",
    )


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
    assert content["layers"][0] == LAYER | {"shape": [4, 10], "notes": [], "block": ""}
    assert content["layers"][1]["relative_error"] is None
    assert content["layers"][1]["notes"] == ["damping raised to 0.1"]


def test_a_report_comes_back_from_its_json_as_it_was():
    assert PruningReport.from_json(two_layers().to_json()) == two_layers()
    assert PruningReport.from_json(PruningReport(()).to_json()) == PruningReport(())


def test_a_report_of_a_newer_version_can_be_read():
    content = json.loads(two_layers().to_json()) | {"news": 1}
    assert PruningReport.from_json(json.dumps(content)) == two_layers()


def changed(**values) -> str:
    content = json.loads(two_layers().to_json())
    content["layers"][0] |= values
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "file.json is not JSON"),
        ("[]", r"file.json: \[\] is no dict"),
        ("{}", "file.json: layers is missing"),
        (changed(name=7), "file.json, layers, 0, name: 7 is no str"),
        (changed(zeros=-1), "zeros: -1 is no count"),
        (changed(zeros=True), "zeros: True is no int"),
        (
            changed(sparsity=float("inf")),
            "file.json .* a number is beyond 2\\^63 or not finite: inf",
        ),
        (changed(sparsity=1.5), "the counts of layers.0.q_proj contradict each other"),
        (changed(zeros=41), "the counts of layers.0.q_proj contradict each other"),
        (changed(bytes_before=0), "the counts of layers.0.q_proj contradict each other"),
        (changed(shape=[0, 10], zeros=0), "the counts of layers.0.q_proj contradict each other"),
        (changed(relative_error=1e308), "a number is beyond"),
        (changed(zeros=10**400), "a number is beyond .* many digits"),
        ('{"layers":' + "[" * 100_000, "it is nested too deep"),
        (changed(name="\ud800"), "a string is no Unicode"),
        (changed(shape=[4, 10, 1]), "shape: 3 values, expected 2"),
        (changed(shape="ab"), "shape: 'ab' is no list"),
        (changed(notes=[None]), "notes, 0: None is no str"),
    ],
)
def test_what_is_no_report_is_an_error_that_says_where(text, words):
    with pytest.raises(CheckpointError, match=words):
        PruningReport.from_json(text, "file.json")


def test_a_folder_without_a_report_gives_none_and_a_damaged_one_names_its_file(tmp_path):
    assert PruningReport.from_folder(tmp_path) is None
    (tmp_path / "pruning_report.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"pruning_report\.json can't be read"):
        PruningReport.from_folder(tmp_path)


def test_pruning_records_how_it_was_done(tiny, token_ids):
    config = SparseConfig(dataset=list(token_ids), seed=5, targets=["mlp"])
    report = hf_sparse.prune(tiny, config)
    assert [layer.block for layer in report.layers] == ["model.layers.0"] * 3 + [
        "model.layers.1"
    ] * 3
    assert list(report.block_seconds) == ["model.layers.0", "model.layers.1"]
    solving = {
        block: sum(layer.seconds for layer in report.layers if layer.block == block)
        for block in report.block_seconds
    }
    assert all(report.block_seconds[block] > solving[block] > 0 for block in solving)
    assert sum(report.block_seconds.values()) < report.seconds
    assert report.config["seed"] == 5
    assert report.config["dataset"]["digest"] == report.data.digest
    assert report.environment.versions["torch"] == torch.__version__
    assert report.environment.threads == torch.get_num_threads()
    assert report.environment.device == "cpu"
    assert report.date.endswith("+00:00")


def test_without_data_blocks_have_their_seconds_too(tiny):
    report = hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    assert list(report.block_seconds) == ["model.layers.0", "model.layers.1"]
    assert {layer.block for layer in report.layers} == set(report.block_seconds)


def test_a_model_of_a_folder_is_named_by_the_folder_alone(tiny, tmp_path):
    tiny.config.name_or_path = tiny.name_or_path = str(tmp_path / "private" / "mine")
    (tmp_path / "private" / "mine").mkdir(parents=True)
    assert hf_sparse.prune(tiny, SparseConfig(method="magnitude")).model == "mine"


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


def test_pandas_gets_a_row_for_each_layer():
    frame = two_layers().to_pandas()
    assert list(frame.columns[:4]) == ["name", "out", "in", "pattern"]
    assert list(frame["name"]) == ["layers.0.q_proj", "layers.0.down"]
    assert list(frame["in"]) == [10, 16]
    assert frame["sparsity"].mean() == pytest.approx(0.625)
    assert frame["relative_error"].isna().tolist() == [False, True]
    assert frame["notes"][1] == "damping raised to 0.1"
    assert len(PruningReport(()).to_pandas()) == 0


def test_without_pandas_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PackageError, match=r"pip install pandas"):
        two_layers().to_pandas()


def test_reports_are_frozen():
    with pytest.raises(AttributeError):
        layer().zeros = 3
    with pytest.raises(AttributeError):
        two_layers().seconds = 0.0
