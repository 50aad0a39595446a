"""Advice says what lost less at the same bytes, and only of settings that were measured."""

from pathlib import Path

from measured_table import measured_table, other_table

from conftest import layer_report
from hf_sparse import PruningReport, SparseConfig
from hf_sparse.pruning.advice import Measured, advise, measured_rows, measurements

ROOT = Path(__file__).parents[2]


def row(name: str, share: float, loss: float) -> Measured:
    """Of a model with the dense perplexity of the file."""
    return Measured.of(name, [{"bytes": share, "perplexity": measurements()["dense"] + loss}])


ROWS = (
    row("sparsegpt-50", 0.56, 8),
    row("best-50", 0.56, 5),
    row("sparsegpt-2:4", 0.55, 12),
    row("sparsegpt-4:8", 0.56, 9),
    row("fast-50-4bit", 0.2, 15),
    row("dense-3bit", 0.2, 14),
    row("dense-8bit", 0.52, 0.1),
)


def advice(**settings) -> str:
    config = SparseConfig(dataset="text.txt", **settings)
    return advise(config.to_dict(), ROWS).partition("lost with ")[2]


def test_the_least_loss_with_as_many_zeros_and_that_of_all_in_no_more_bytes_are_named():
    dense = measurements()["dense"]
    best, rounded = f"best 50 %: {dense + 5:.1f} in 0.56", f"no zeros and 8 bits: {dense + 0.1:.1f}"
    for zeros in ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"}):
        said = advice(method="sparsegpt", **zeros)
        assert said.startswith(best)
        assert f"; {rounded} in 0.52" in said
    assert advice(method="best", sparsity=0.5).startswith(rounded)


def test_nothing_is_said_of_what_was_not_measured_or_is_the_best_there_is():
    assert advice(sparsity=0.0, bits=8) == ""
    assert advice(sparsity=0.55) == ""
    assert advice(pattern="1:4") == ""
    assert advice(sparsity={"mlp": 0.5}) == ""
    assert advice(sparsity=0.5, refit=3) == ""
    assert advice(sparsity=0.5, low_rank=4) == ""
    assert advise({}, ROWS) == advise({"method": "mine", "sparsity": 0.5}, ROWS) == ""


def test_a_difference_within_what_draws_of_the_data_differ_by_is_none():
    assert advice(method="fast", sparsity=0.5, bits=4) == ""  # 14 of 15


def test_a_report_says_it_below_its_totals():
    config = SparseConfig(sparsity=0.5, dataset="text.txt").to_dict()
    report = PruningReport((layer_report(),), config=config)
    assert report.advice()
    assert str(report).endswith(f"{report.summary()}\n{report.advice()}")
    assert str(PruningReport((layer_report(),))).endswith(report.summary())


def test_every_measured_row_can_be_asked_for():
    for each in measured_rows():
        assert each.perplexity > measurements()["dense"] - 0.5
        assert 0 < each.bytes < 1
        assert 0 <= each.share < 1


def test_the_documentation_shows_what_was_measured():
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert measured_table() in page
    assert other_table() in page
