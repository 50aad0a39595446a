"""What docs/extending.md shows keeps the contracts, registered from outside by one line."""

import re
import subprocess
import sys

import pytest

from conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()


def example(heading):
    """The first Python block of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def run(example, name, tests, folder):
    """The contract tests of what an example registers."""
    file = folder / "example.py"
    file.write_text(example)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", "-p", "no:cacheprovider"]
    where = [f"tests/contracts/{tests}", "--register", str(file), "-k", name]
    return subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("heading", "name", "tests"),
    [
        ("A method", "ria", "test_solvers.py"),
        ("A format", "coordinates", "test_formats.py"),
        ("A format", "coordinates", "test_quantized_format.py"),
        ("A kernel", "columns", "test_kernels.py"),
    ],
    ids=str,
)
def test_the_example_of_a_section_passes_the_contract_tests(heading, name, tests, tmp_path):
    done = run(example(heading), name, tests, tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


def test_an_example_that_breaks_its_contract_is_found_out(tmp_path):
    broken = example("A method").replace("weight.where(", "weight.mul_(2).where(")
    done = run(broken, "ria", "test_solvers.py", tmp_path)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
