"""What every test shares: checked shapes, no network, the models and texts of the project."""

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only wait for each other
os.environ["HF_SPARSE_MEASURE"] = "0"  # the choice of kernels must not depend on how busy we are

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from jaxtyping import install_import_hook

# The annotated shapes and dtypes are checked at every call while the tests run, wherever tensors
# are handed over; what users pass is checked by the package itself. Layers and kernels are left
# out: torch.compile can't see through the checks.
SOLVERS = Path(__file__).parents[1] / "src" / "hf_sparse" / "solvers"
CHECKED = ["core.grids", "core.patterns", "core.statistics", "formats", "solvers.refinement"]
CHECKED += [f"solvers.{p.stem}" for p in SOLVERS.glob("*.py") if p.stem != "sparsegpt_triton"]
with install_import_hook([f"hf_sparse.{name}" for name in CHECKED], "beartype.beartype"):
    import hf_sparse  # noqa: F401

import pytest
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from hf_sparse.pruning.report import LayerReport
from hf_sparse_cli import main

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption(
        "--register",
        action="append",
        default=[],
        metavar="FILE",
        help="run a Python file that registers a method, format or kernel, for the contract tests",
    )


def pytest_configure(config):
    for file in map(Path, config.getoption("--register")):
        # A module like any other, which pickles and compilers find again.
        spec = importlib.util.spec_from_file_location(file.stem, file)
        sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[file.stem])


def pytest_collection_modifyitems(items):
    """Whole models first: a process is left idle by a long test that starts last."""
    items.sort(key=lambda item: item.path.parent.name not in ("integration", "sweep"))


def pytest_collection_finish():
    """What was imported and collected stays: garbage is looked for without going through it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # plugins that are imported for the summary look for what refers to them


@pytest.fixture
def model_path() -> Path:
    """The trained 7 M parameter Llama under examples/."""
    return ROOT / "examples" / "models" / "tiny-llama-docs"


@pytest.fixture
def data_path() -> Path:
    """Short calibration and evaluation texts."""
    return ROOT / "examples" / "data"


@pytest.fixture(scope="session")
def short_examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder examples/ with one block and less text: for what must run, whatever it finds."""
    source, folder = ROOT / "examples", tmp_path_factory.mktemp("short") / "examples"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("models"))
    path = Path("models", "tiny-llama-docs")
    short = AutoModelForCausalLM.from_pretrained(source / path, num_hidden_layers=1)
    short.save_pretrained(folder / path)
    AutoTokenizer.from_pretrained(source / path).save_pretrained(folder / path)
    for text in (folder / "data").glob("*.txt"):
        text.write_text(text.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(model_path: Path):
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture
def trained(model_path: Path):
    """The trained model, dense, fp32."""
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def save_with_tokenizer(folder: Path, **changes) -> Path:
    """A random Llama, as `tiny_llama`, in a folder with the tokenizer of the example."""
    tiny_llama(vocab_size=4096, pad_token_id=None, **changes).save_pretrained(folder)
    example = ROOT / "examples" / "models" / "tiny-llama-docs"
    AutoTokenizer.from_pretrained(example).save_pretrained(folder)
    return folder


def assert_said(caught: pytest.ExceptionInfo, given: object, known: Iterable[str]) -> None:
    """An error names what was given and everything that it could have been."""
    text = str(caught.value)
    assert repr(given) in text
    assert [name for name in known if name not in text] == []


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


LAYER = {
    "name": "layers.0.q_proj",
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
    "kernel": "tile",
}


def layer_report(name: str = "layers.0.q_proj", **changes) -> LayerReport:
    """Half of 40 weights are zeros."""
    return LayerReport(**(LAYER | {"name": name} | changes))


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def token_ids() -> torch.Tensor:
    """12 sequences of 16 ids that `tiny` knows."""
    return torch.randint(3, 61, (12, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cli(capsys):
    """Runs a command line; its exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run
