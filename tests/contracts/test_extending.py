"""What docs/extending.md shows keeps the contracts, registered from outside by one line."""

import re
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest

from conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()


def example(heading):
    """The first Python block of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


# A method that writes to the weight that it is given.
BROKEN = example("A method").replace("weight.where(", "weight.mul_(2).where(")
REGISTERED = {
    "ria": example("A method"),
    "coordinates": example("A format"),
    "inputs": example("A kernel"),
    "broken": BROKEN.replace('"ria"', '"broken"'),
}
CONTRACTS = [
    ("ria", "test_solvers"),
    ("coordinates", "test_formats"),
    ("coordinates", "test_quantized_format"),
    ("inputs", "test_kernels"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """How many contract tests (file, name, passed?) there were of what the page registers."""
    folder = tmp_path_factory.mktemp("registered")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["--junitxml", str(folder / "tests.xml"), "-k", " or ".join(REGISTERED)]
    command += [f"tests/contracts/{tests}.py" for _, tests in CONTRACTS]
    for name, code in REGISTERED.items():
        (folder / f"{name}_example.py").write_text(code)
        command += ["--register", str(folder / f"{name}_example.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout  # of the broken one, see below
    return Counter(
        (case.get("classname"), name, not len(case))
        for case in ElementTree.parse(folder / "tests.xml").iter("testcase")
        for name in REGISTERED
        if re.search(rf"[\[-]{name}[\]-]", case.get("name"))
    )


@pytest.mark.parametrize(("name", "tests"), CONTRACTS)
def test_the_example_of_a_section_passes_the_contract_tests(name, tests, outcomes):
    assert outcomes[f"tests.contracts.{tests}", name, True] > 10
    assert outcomes[f"tests.contracts.{tests}", name, False] == 0


def test_an_example_that_breaks_its_contract_is_found_out(outcomes):
    assert outcomes["tests.contracts.test_solvers", "broken", False] > 0
