"""Every code block of the README and the docs runs, in order, in one namespace a page."""

import re
from pathlib import Path

import pytest
from page_blocks import run_page

import hf_sparse
from conftest import ROOT
from hf_sparse.formats import FORMATS
from hf_sparse.kernels import KERNELS
from hf_sparse.solvers import SOLVERS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))


@pytest.fixture
def registries(monkeypatch):
    """What a page registers is gone after it."""
    for registry in (SOLVERS, FORMATS, KERNELS):
        monkeypatch.setattr(registry, "_classes", dict(registry))


# PEFT asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.pin_memory. argument:UserWarning")  # Trainer, without a GPU
# What is in sharing.md needs a Hub: test_sharing.py runs it.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "sharing.md"], ids=lambda page: page.name
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, registries, short_examples):
    (tmp_path / "examples").symlink_to(short_examples)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: hf_sparse\.(\w+)$", "".join(map(Path.read_text, REFERENCE)), re.M)
    errors = {name for name in hf_sparse.__all__ if name.endswith("Error")}
    assert sorted({*listed, *errors} - {"errors"}) == sorted(hf_sparse.__all__)
