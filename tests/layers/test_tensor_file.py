"""Tensors of offloaded layers in files of their own."""

import copy
import os

import pytest
import torch

from hf_sparse.core.errors import CheckpointError, SaveError
from hf_sparse.layers.tensor_file import TensorFile


def test_tensors_come_back_as_they_were_also_if_they_share_their_memory(tmp_path):
    whole = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    tensors = {"whole": whole, "turned": whole.T, "part": whole[1:]}
    held = TensorFile(tensors, tmp_path)
    assert dict(held).keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert "other" not in held


def test_a_copy_reads_the_file_when_the_original_is_gone(tmp_path):
    held = TensorFile({"weight": torch.ones(2)}, tmp_path)
    again = copy.deepcopy(held)
    del held
    assert torch.equal(again["weight"], torch.ones(2))
    del again
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_is_named(tmp_path):
    held = TensorFile({"weight": torch.ones(2)}, tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}.*Load the model anew"):
        held["weight"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(SaveError, match=r"missing.*pass another offload_folder"):
        TensorFile({"weight": torch.ones(2)}, tmp_path / "missing")


def test_a_forked_process_that_ends_leaves_the_file(tmp_path):
    held = TensorFile({"weight": torch.ones(2)}, tmp_path)
    child = os.fork()
    if child == 0:
        del held
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(held["weight"], torch.ones(2))
