"""Quality against the published reference code, on real models. Minutes: run with -m slow."""

import json
import sys

import pytest
import torch

from conftest import FIXTURES, ROOT

sys.path.insert(0, str(ROOT / "examples"))
import reference_figures as figures

needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="needs the fixtures folder")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows():
    if not FIXTURES.exists():
        return []
    reference = json.loads((FIXTURES / "reference.json").read_text())
    return [row for row in reference if row != "dense"]


@pytest.mark.slow
@needs_fixtures
@pytest.mark.parametrize("row", rows())
def test_perplexity_is_within_one_per_cent_of_the_reference(row, one_thread):
    reference = json.loads((FIXTURES / "reference.json").read_text())[row]
    got = figures.measure_row(FIXTURES, row, repeats=1)
    assert got["ppl"] <= 1.01 * reference["ppl"]


@pytest.mark.slow
@needs_fixtures
@pytest.mark.parametrize(
    ("row", "most"),
    [
        ("fast-60", 42.85), ("fast-2:4", 42.60),
        ("balanced-60", 42.25), ("balanced-2:4", 42.50),
        ("best-60", 41.90), ("best-2:4", 42.10), ("best-50-4bit", 42.37),
    ],
)  # fmt: skip
def test_recipes_lose_less_than_the_reference(row, most, one_thread):
    assert figures.measure_row(FIXTURES, row, repeats=1)["ppl"] <= most


@pytest.mark.slow
@needs_fixtures
@pytest.mark.parametrize(
    ("row", "least"),
    [("fast-50", 0.953), ("best-50", 0.968), ("fast-60", 0.905), ("best-60", 0.930)],
)
def test_recipes_keep_more_of_the_sentence_encoder(row, least, one_thread):
    text = (FIXTURES / "calibration.txt").read_text()
    assert figures.measure_encoder(text, row) >= least


@pytest.mark.slow
@needs_fixtures
def test_the_sentence_encoder_keeps_its_embeddings(one_thread):
    text = (FIXTURES / "calibration.txt").read_text()
    cosine = {
        row: figures.measure_encoder(text, row)
        for row in ("magnitude-50", "wanda-50", "sparsegpt-50", "sparsegpt-60")
    }
    assert cosine["magnitude-50"] < cosine["wanda-50"] < cosine["sparsegpt-50"]
    assert cosine["sparsegpt-50"] >= 0.935
    assert cosine["sparsegpt-60"] >= 0.875


@pytest.mark.slow
def test_methods_rank_on_a_sentence_encoder_too(data_path):
    """A short form of the test above, on the text that ships."""
    text = (data_path / "calibration.txt").read_text()
    cosine = [
        figures.measure_encoder(text, row, calibration=slice(0, 80), evaluation=slice(100, 160))
        for row in ("magnitude-50", "wanda-50", "sparsegpt-50")
    ]
    assert cosine[0] < cosine[1] < cosine[2]
    assert cosine[2] > 0.9
