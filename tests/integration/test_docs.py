"""Every Python block of the README and the docs runs, in order, in one namespace a page.

So do the lines of shell blocks that call hf-sparse; a YAML block is the file that its first line
names.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

import hf_sparse
from conftest import ROOT
from hf_sparse.formats import FORMATS
from hf_sparse.kernels import KERNELS
from hf_sparse.solvers import SOLVERS
from hf_sparse_cli import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))


def blocks(page, *languages):
    """(language, code) of the page's blocks, in order."""
    pattern = rf"```({'|'.join(languages)})\n(.*?)```"
    return re.findall(pattern, page.read_text(), flags=re.DOTALL)


def run_commands(block):
    """Run the lines that call hf-sparse."""
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        if program == "hf-sparse":
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == 0, line


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
    namespace = {}
    for language, block in blocks(page, "python", "json", "yaml", "sh"):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
        elif language == "json":
            json.loads(block)
        elif language == "yaml":
            (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
        else:
            run_commands(block)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: hf_sparse\.(\w+)$", "".join(map(Path.read_text, REFERENCE)), re.M)
    errors = {name for name in hf_sparse.__all__ if name.endswith("Error")}
    assert sorted({*listed, *errors} - {"errors"}) == sorted(hf_sparse.__all__)
