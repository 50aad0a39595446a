"""Quantised layers in transformers: saved, reloaded to the bit, converted, adapted, refused."""

import copy
import json

import fresh
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import losses_of
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import logits
from hf_sparse import CheckpointError, SparseConfig, SparseLinear
from hf_sparse.core.grids import Grid
from hf_sparse.core.patterns import Unstructured
from hf_sparse.formats import Quantized, choose_format
from hf_sparse.layers import sparse_layers
from hf_sparse.layers.replace import replace_module

GRIDS = {
    "8": Grid(8, 8, True), "4": Grid(4, 8, True), "3": Grid(3, None, True),
    "8 asym": Grid(8, 8, False), "4 asym": Grid(4, 8, False),
}  # fmt: skip
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
LAYOUTS = ["bitmask", "n:m", "dense"]


def quantise(model, grid, layout="auto"):
    """Put a pruned model's weights on a grid."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, SparseLinear):
            continue
        dense = layer.weight.float()
        weight = grid.fit(dense).round(dense)
        pattern = Unstructured(0.5)
        fmt = choose_format(weight, pattern, layout)
        other = SparseLinear(
            fmt, fmt.pack(weight), layer.shape, layer.weight_dtype, layer.bias, layer.axes
        )
        replace_module(model, layer, other)
        other.resolve()
        assert model.get_submodule(name) is other
    return model


@pytest.fixture
def pruned(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", pattern="2:4"))
    return tiny


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


@every_grid
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_and_loading_gives_the_same_codes_scales_and_logits(
    pruned, grid, layout, tmp_path, token_ids
):
    model = quantise(pruned, grid, layout)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer in sparse_layers(again).values():
        assert isinstance(layer.format, Quantized)
        assert layer.format.grid == grid
        assert layer.format.layout.name == layout
    assert_same_state(again, model)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    again.save_pretrained(tmp_path / "twice", max_shard_size="8KB")
    for file in (tmp_path / "twice").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


@every_grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_in_another_dtype_keeps_the_codes_and_scales(pruned, grid, dtype, tmp_path):
    model = quantise(pruned, grid)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cast = copy.deepcopy(model).to(dtype)
    assert_same_state(again, cast)
    for name, layer in sparse_layers(model).items():
        other = again.get_submodule(name)
        assert other.weight_dtype == dtype
        assert torch.equal(other.weight, layer.weight.to(dtype))
        for key, tensor in layer.packed.items():
            assert other.packed[key].dtype == tensor.dtype
            assert torch.equal(other.packed[key], tensor)


def test_the_files_hold_codes_and_scales_and_the_header_the_grid(pruned, tmp_path):
    quantise(pruned, Grid(4, 8, False), "bitmask").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        entry = json.loads(file.metadata()["hf_sparse"])["layers"]["model.layers.0.mlp.up_proj"]
    assert entry == {
        "format": "quantized", "shape": [40, 24], "bits": 4, "group_size": 8, "sym": False,
        "layout": {"format": "bitmask"},
    }  # fmt: skip
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.mlp.up_proj."
    found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    assert {k: t.dtype for k, t in found.items()} == {
        "weight": torch.uint8, "weight_bitmask": torch.uint8,
        "weight_scales": torch.bfloat16, "weight_zeros": torch.uint8,
    }  # fmt: skip


@pytest.mark.parametrize("key", ["weight_scales", "weight_zeros", "weight"])
def test_damaged_tensors_are_named_with_their_file(pruned, key, tmp_path):
    quantise(pruned, Grid(3, 8, False), "bitmask").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = f"model.layers.1.self_attn.v_proj.{key}"
    if key == "weight_scales":
        tensors[name][0, 0] = float("nan")
    elif key == "weight_zeros":
        tensors[name][0, 0] = 8
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@every_grid
def test_dequantize_and_export_give_plain_layers_with_the_same_weights(
    pruned, grid, tmp_path, token_ids
):
    model = quantise(pruned, grid)
    expected = logits(model, token_ids)
    weights = {name: layer.weight for name, layer in sparse_layers(model).items()}
    hf_sparse.export_dense(model, tmp_path)
    export = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(export, token_ids), expected)
    dense = model.dequantize()
    assert not sparse_layers(dense)
    for name, weight in weights.items():
        assert torch.equal(dense.get_submodule(name).weight, weight)
        assert torch.equal(export.get_submodule(name).weight, weight)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_transformers_refuses_the_checkpoint(pruned, layout, tmp_path):
    quantise(pruned, Grid(8, 8, True), layout).save_pretrained(tmp_path)
    result = fresh.run(PLAIN, tmp_path)
    assert result.returncode != 0
    assert "hf_sparse" in result.stderr
    assert "import-hf_sparse-first" in result.stderr


@every_grid
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lora_learns_on_quantised_layers_and_leaves_them_as_they_are(pruned, grid, token_ids):
    quantise(pruned, grid)
    before = {n: b.clone() for n, b in pruned.named_buffers()}
    model = get_peft_model(pruned, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert isinstance(
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, SparseLinear
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = losses_of(model, token_ids, optimizer, 8)
    assert losses[-1] < losses[0]
    after = {n.replace(".base_layer", ""): b for n, b in model.get_base_model().named_buffers()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_explain_tells_the_resident_bytes_and_the_grid(pruned):
    model = quantise(pruned, Grid(4, 8, True))
    explanation = hf_sparse.explain(model)
    layer = next(la for la in explanation.layers if la.name.endswith("0.mlp.up_proj"))
    assert layer.kernel == "tile"
    held = model.model.layers[0].mlp.up_proj
    assert layer.bytes_resident == sum(b.nbytes for b in held.buffers())
    assert layer.format == f"4-bit {held.format.layout.name}"
    assert "4-bit" in str(explanation)
