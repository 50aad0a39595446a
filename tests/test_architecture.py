"""Public names, the version, and who may import whom."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.formats import FORMATS
from hf_sparse.kernels import KERNELS
from hf_sparse.solvers import SOLVERS

SOURCE = Path(hf_sparse.__file__).parent
COMMAND_LINE = SOURCE.parent / "hf_sparse_cli"
ROOT = Path(__file__).parents[1]

# Folders from the bottom up: each may import from lower ranks only.
FLOORS = [
    {"core"},
    {"formats"},
    {"kernels"},
    {"solvers", "layers"},
    {"config"},
    {"calibration", "checkpoint"},
    {"pruning"},
    {"evaluation"},
    {"publish", "training"},
    {"quantizer"},
    {"__init__"},
]
RANKS = {name: rank for rank, names in enumerate(FLOORS) for name in names}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; a folder's own module ends in __init__."""
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in sorted(SOURCE.rglob("*.py"))
    }


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, also inside functions."""
    package = ["hf_sparse", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from .calibration import data` may name a module or a value of one.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


@functools.cache
def internal(name: str, path: Path) -> set[str]:
    """The modules of this package that a file imports, by their names in `modules()`."""
    known, found = modules(), set()
    for target in imports(name, path):
        parts = target.split(".")[1:]
        if target.split(".")[0] != "hf_sparse":
            continue
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        options = [prefix + end for prefix in prefixes for end in ("", ".__init__")]
        found.add(next((option for option in options if option in known), "__init__"))
    return found


def external(name: str, path: Path) -> set[str]:
    return {target.split(".")[0] for target in imports(name, path)}


# --- public names ---------------------------------------------------------------------------


def test_public_names_are_sorted_and_listed_once():
    assert hf_sparse.__all__ == sorted(set(hf_sparse.__all__))


@pytest.mark.parametrize("name", hf_sparse.__all__)
def test_a_public_name_exists_and_is_documented(name):
    value = getattr(hf_sparse, name)
    doc = inspect.getdoc(value)
    assert doc
    # A dataclass without a text gets its signature as one.
    assert not doc.startswith(f"{name}(")
    assert value.__module__.startswith("hf_sparse.")


def test_everything_public_that_the_package_imports_is_listed():
    own = {
        name
        for name, value in vars(hf_sparse).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("hf_sparse")
    }
    assert own == set(hf_sparse.__all__)


def test_every_module_says_what_it_is():
    files = [*SOURCE.rglob("*.py"), *COMMAND_LINE.rglob("*.py")]
    assert len(files) > 200
    silent = [f for f in files if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))]
    assert silent == []


def test_the_version_is_the_newest_one_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+[\w.+-]*)", text, re.MULTILINE)
    assert newest is not None, "CHANGELOG.md has no heading like '## 0.1.0'"
    assert version("hf_sparse") == newest[1]
    assert hf_sparse.__version__ == newest[1]


# --- imports --------------------------------------------------------------------------------


def importers(package: str) -> set[str]:
    return {name for name, path in modules().items() if package in external(name, path)}


def test_what_computes_does_not_know_transformers():
    computing = {"formats", "kernels", "solvers"}
    assert {name.split(".")[0] for name in importers("transformers")}.isdisjoint(computing)
    assert "quantizer" in importers("transformers")


def test_only_what_publishes_knows_huggingface_hub():
    assert {name.split(".")[0] for name in importers("huggingface_hub")} == {"publish"}


def test_the_package_does_not_know_its_command_line():
    assert importers("hf_sparse_cli") == set()


def test_every_module_has_a_rank():
    assert {name.split(".")[0] for name in modules()} == set(RANKS)


def test_a_module_imports_only_from_below_or_from_its_own_folder():
    upwards = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in internal(name, path)
        if (own := name.split(".")[0]) != (other := target.split(".")[0])
        and RANKS[other] >= RANKS[own]
    ]
    assert upwards == []


def plug_ins() -> set[str]:
    """Modules of the registered methods, layouts and kernels."""
    registered = [*SOLVERS.values(), *FORMATS.values(), *KERNELS.values()]
    return {cls.__module__.removeprefix("hf_sparse.") for cls in registered}


@pytest.mark.parametrize("name", sorted(plug_ins()))
def test_a_plug_in_imports_no_other_one_of_its_kind(name):
    folder = name.split(".")[0]
    siblings = {n for n in plug_ins() - {name} if n.split(".")[0] == folder}
    assert internal(name, modules()[name]).isdisjoint(siblings)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: internal(name, path) for name, path in modules().items()}
    # Raises CycleError with the circle.
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_reading_of_imports_finds_what_python_imports():
    # The checks above rest on it: what a module holds from another one must have been found.
    for name, path in modules().items():
        dotted = "hf_sparse." + name.removesuffix("__init__").rstrip(".")
        module = importlib.import_module(dotted.rstrip("."))
        origins = {
            value.__module__.removeprefix("hf_sparse.")
            for value in vars(module).values()
            if inspect.isclass(value) and value.__module__.startswith("hf_sparse.")
        }
        folders = {origin.split(".")[0] for origin in origins} - {name.split(".")[0]}
        assert folders <= {target.split(".")[0] for target in internal(name, path)}


def test_kernels_of_gpus_know_none_of_the_cpu_s_and_the_other_way_round():
    for own, other in (("gpu", "cpu"), ("cpu", "gpu")):
        names = [name for name in modules() if name.startswith(f"kernels.{own}.")]
        assert len(names) > 5
        found = {target for name in names for target in internal(name, modules()[name])}
        assert not {target for target in found if f".{other}." in target}


def test_importing_the_package_imports_no_trainer_and_nothing_optional():
    slow = ("transformers.trainer", "datasets", "matplotlib", "pandas", "lm_eval", "trackio")
    code = f"import sys, hf_sparse; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
