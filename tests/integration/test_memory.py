"""What a process holds resident while a sparse checkpoint is loaded."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear


def resident(file: Path) -> int:
    """Bytes of a file that are resident through this process's mappings of it."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the line that opens a mapping ends in its file
            ours = words[-1] == str(file)
        elif ours and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sparse checkpoint of two blocks, 30 MB."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, vocab_size=64
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    folder = tmp_path_factory.mktemp("sparse")
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_a_layer_leaves_nothing_of_the_file_resident_behind_it(folder, monkeypatch, dtype):
    file = folder / "model.safetensors"
    found = []

    def resolve(layer: SparseLinear) -> None:
        real(layer)
        found.append(resident(file))

    real = SparseLinear.resolve
    monkeypatch.setattr(SparseLinear, "resolve", resolve)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert len(found) == 2 * 7
    # Making a tensor of a mapped file reads around its first page, whatever is done with it later.
    assert max(found) < file.stat().st_size / 2
    assert max(found) - found[0] < 1 << 20
    assert resident(file) <= found[0]
    assert loaded.lm_head.weight.dtype == dtype
