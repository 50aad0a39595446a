"""Models that accelerate has on disk: pruned, they stay there."""

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import logits
from hf_sparse import SparseConfig, SparseLinear

LAYERS = "model.layers"
ON_DISK = {LAYERS: "disk"} | dict.fromkeys(
    ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
)
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@pytest.fixture
def dense_folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def config(token_ids):
    return SparseConfig(method="wanda", sparsity=0.5, dataset=list(token_ids))


@pytest.fixture
def offload_folder(tmp_path):
    """A folder in which a user has files already."""
    folder = tmp_path / "offload"
    folder.mkdir()
    (folder / "own.safetensors").write_bytes(b"the user's")
    return folder


def load(dense_folder, config, folder=None):
    return AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=config, device_map=dict(ON_DISK), offload_folder=folder
    )


def all_on_meta(model):
    return all(tensor.is_meta for tensor in model.get_submodule(LAYERS).state_dict().values())


def names(folder):
    return {path.name for path in folder.iterdir()}


def check_same_files(model, other, tmp_path):
    paths = [tmp_path / "one", tmp_path / "two"]
    for each, path in zip([model, other], paths, strict=True):
        each.save_pretrained(path)
    one, two = ((path / "model.safetensors").read_bytes() for path in paths)
    assert one == two


def test_packed_layers_are_in_files_that_go_with_their_model(
    dense_folder, config, offload_folder, token_ids, tmp_path
):
    in_memory = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    first, second = (load(dense_folder, config, offload_folder) for _ in range(2))
    assert len(names(offload_folder)) == 1 + 2 * 14
    del first
    gc.collect()
    assert len(names(offload_folder)) == 1 + 14
    assert all_on_meta(second)
    torch.testing.assert_close(logits(second, token_ids), logits(in_memory, token_ids))
    generated = second.generate(token_ids[:1], max_new_tokens=2, do_sample=False)
    assert torch.equal(
        generated, in_memory.generate(token_ids[:1], max_new_tokens=2, do_sample=False)
    )
    check_same_files(second, in_memory, tmp_path)
    assert all_on_meta(second)
    del second
    gc.collect()
    assert names(offload_folder) == {"own.safetensors"}
    assert (offload_folder / "own.safetensors").read_bytes() == b"the user's"


def test_dequantized_layers_stay_on_disk(dense_folder, config, offload_folder, token_ids):
    model = load(dense_folder, config, offload_folder)
    expected = logits(model, token_ids)
    dense = model.dequantize()
    gc.collect()
    assert len(names(offload_folder)) == 1 + 14
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    assert all_on_meta(dense)
    torch.testing.assert_close(logits(dense, token_ids), expected)


def test_a_loaded_model_that_is_pruned_stays_on_disk(
    dense_folder, config, token_ids, tmp_path, monkeypatch
):
    # Without a folder, as transformers allows for safetensors, files are temporary.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = AutoModelForCausalLM.from_pretrained(dense_folder, device_map=dict(ON_DISK))
    hf_sparse.prune(model, config)
    assert len(names(tmp_path / "temporary")) == 14
    assert all_on_meta(model)
    in_memory = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    torch.testing.assert_close(logits(model, token_ids), logits(in_memory, token_ids))
    check_same_files(model, in_memory, tmp_path)


def test_a_layer_with_too_few_zeros_to_pack_is_offloaded_again(
    dense_folder, offload_folder, token_ids
):
    config = SparseConfig(method="magnitude", sparsity=0.02)
    model = load(dense_folder, config, offload_folder)
    in_memory = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert all_on_meta(model)
    torch.testing.assert_close(logits(model, token_ids), logits(in_memory, token_ids))


def test_packed_layers_leave_no_dense_weight_behind(tiny, config, token_ids):
    weight = weakref.ref(tiny.model.layers[0].mlp.up_proj.weight)
    alive = []
    tiny.model.layers[1].register_forward_pre_hook(lambda *_: alive.append(weight() is not None))
    hf_sparse.prune(tiny, config)
    assert alive[0]
    assert not alive[-1]


def test_weights_that_are_mapped_from_a_file_are_not_written_to(dense_folder, config):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    layer = model.model.layers[0].mlp.up_proj
    before, mapped = layer.weight.detach().clone(), layer.weight.detach()
    assert not mapped.untyped_storage().resizable()
    hf_sparse.prune(model, config)
    assert torch.equal(mapped, before)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
