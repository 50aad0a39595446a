"""Model families of every kind, from pruning to reloading in another process.

Tiny random models; `python tests/sweep` takes all types that transformers has.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check import KINDS, NOT_BUILT, PASS, UNREACHED, build, check, check_files, types_of

import hf_sparse
from hf_sparse import SparseConfig

CHOSEN = {
    "causal LM": [
        "llama",
        "gpt2",  # Conv1D
        "falcon",  # its own linear layer
        "mamba",  # a weight that is read, never called
        "jamba",  # state space, attention and experts
        "bart",  # cross-attention without an encoder
        "mixtral",
        "gpt_oss",  # transposed experts with biases
        "nemotron_h",  # experts without a gate
        "laguna",  # renamed keys
        "xlm",  # a cache that can't be turned off
        "rwkv",
    ],
    "masked LM": ["bert", "albert", "funnel", "deberta-v2"],
    "sequence to sequence": ["t5", "switch_transformers"],
    # The last has nothing but convolutions.
    "image classification": ["vit", "segformer", "poolformer"],
    "speech to text": ["whisper", "speech_to_text"],
    "speech CTC": ["wav2vec2"],
    "image-text to text": ["llava", "blip", "qwen3_vl"],
}
ALL = [(kind, name) for kind in KINDS for name in types_of(kind)]


class Reloader:
    """Loads and runs models in one process that was started afresh."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, str(Path(__file__).with_name("reload.py"))]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, folder: Path, cls: type, inputs: dict) -> list[torch.Tensor]:
        given, found = self._folder / "inputs.pt", self._folder / "outputs.pt"
        torch.save(inputs, given)
        self.process.stdin.write(f"{folder}\t{cls.__name__}\t{given}\t{found}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", f"{cls.__name__} can't be reloaded"
        return torch.load(found)


@pytest.fixture(scope="module")
def reloader(tmp_path_factory):
    reloader = Reloader(tmp_path_factory.mktemp("reload"))
    yield reloader
    reloader.process.stdin.close()
    reloader.process.wait()


# What transformers' models warn of while they are built or run is not this package's.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in CHOSEN.items() for name in names]
)
def test_a_family_is_pruned_saved_reloaded_and_used(kind, name, reloader):
    outcome = check(kind, name, reloader)
    assert outcome.status == PASS, outcome.reason
    assert outcome.layers > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["git", "gemma3", "phi4_multimodal"])
def test_a_model_with_encoders_is_pruned_on_text_alone(name, tmp_path):
    model = build("causal LM", name)
    data = [{"input_ids": torch.randint(5, 40, (2, 8))} for _ in range(2)]
    report = hf_sparse.prune(model, SparseConfig(dataset=data))
    assert any("layers.0" in layer.name or "layer.0" in layer.name for layer in report.layers)
    assert any("needs" in why and UNREACHED in why for why in report.left_dense.values())
    model.save_pretrained(tmp_path)
    check_files(tmp_path, report)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_type_that_can_be_built_tiny_passes(kind, name):
    outcome = check(kind, name)
    if outcome.status == NOT_BUILT:
        pytest.skip(outcome.reason)
    assert outcome.status != "fails", outcome.reason
