"""Sparse + low-rank in transformers and PEFT: pruned, saved, refused, turned into an adapter."""

import copy
import json

import fresh
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import losses_of
from tiny_models import tiny_gpt2
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import logits
from hf_sparse import CheckpointError, ConfigError, SaveError, SparseConfig, SparseLinear
from hf_sparse.checkpoint.state_dict import sparse_state_dict
from hf_sparse.core.low_rank import KEY_A, KEY_B, LowRank
from hf_sparse.layers import sparse_layers
from hf_sparse.layers.replace import replace_module

UP = "model.layers.0.mlp.up_proj"
quiet_peft = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def prune(model, token_ids, **settings):
    settings = {"dataset": list(token_ids), "low_rank": 3, **settings}
    return hf_sparse.prune(model, SparseConfig(**settings))


@pytest.fixture
def pruned(tiny, token_ids):
    prune(tiny, token_ids)
    return tiny


def damage(folder, change, header_change=None):
    """Rewrite a checkpoint's file with other tensors or metadata; returns nothing."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    if header_change is not None:
        content = json.loads(header["hf_sparse"])
        header_change(content["layers"][UP])
        header["hf_sparse"] = json.dumps(content)
    save_file(tensors, path, header)


# --- pruning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}, {"bits": 4, "group_size": 8}])
def test_pruning_gives_sparse_layers_with_a_low_rank_part_that_lowers_the_error(
    tiny, token_ids, settings
):
    alone = prune(copy.deepcopy(tiny), token_ids, low_rank=0, **settings)
    report = prune(tiny, token_ids, **settings)
    layers = sparse_layers(tiny)
    assert set(layers) == {layer.name for layer in report.layers}
    assert len(layers) == 14
    errors = {layer.name: layer.relative_error for layer in alone.layers}
    for layer in report.layers:
        held = layers[layer.name]
        assert held.rank == 3
        zeros = int((held.sparse_weight == 0).sum())
        assert layer.zeros == zeros
        assert layer.sparsity == zeros / held.sparse_weight.numel() >= 0.5
        assert layer.format == held.format.label
        stored = [*held.packed.values(), *held.low_rank.tensors().values()]
        assert layer.bytes_after == sum(t.nbytes for t in stored)
        assert layer.bytes_resident == sum(b.nbytes for b in held.buffers())
        if layer.name.startswith("model.layers.0.self_attn.q"):
            assert layer.relative_error < 0.95 * errors[layer.name]
    mean = sum(layer.relative_error for layer in report.layers) / 14
    assert mean < 0.9 * sum(errors.values()) / 14
    explained = {e.name: e for e in hf_sparse.explain(tiny).layers}
    assert explained[UP].bytes_resident == layers[UP].resident_bytes()


def test_the_reported_error_is_that_of_both_parts(tiny, token_ids):
    report = prune(tiny, token_ids, low_rank=12)  # half of the smaller side
    alone = {layer.name: layer for layer in report.layers}
    layer = tiny.get_submodule("model.layers.0.self_attn.q_proj")
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(tiny, token_ids)
    x = inputs[0].flatten(0, 1)
    assert alone["model.layers.0.self_attn.q_proj"].relative_error < 0.2
    full, sparse = x @ layer.weight.T, x @ layer.sparse_weight.T
    assert (full - sparse).norm() > 0.2 * full.norm()


def test_later_blocks_see_the_low_rank_part_of_earlier_ones(tiny, token_ids):
    # The inputs of the second block are those of the pruned model, which has both parts.
    dense = copy.deepcopy(tiny)
    report = prune(tiny, token_ids, low_rank=8, method="magnitude")
    name = "model.layers.1.self_attn.q_proj"
    layer, inputs = tiny.get_submodule(name), []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(tiny, token_ids)
    x = inputs[0].flatten(0, 1)
    weight = dense.get_submodule(name).weight.detach()
    expected = (x @ (weight - layer.weight).T).norm() / (x @ weight.T).norm()
    found = next(la.relative_error for la in report.layers if la.name == name)
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", ["wanda", "magnitude", "fast", "best"])
def test_it_goes_with_every_method(tiny, token_ids, method):
    prune(tiny, token_ids, method=method)
    assert {layer.rank for layer in sparse_layers(tiny).values()} == {3}


def test_a_layer_with_hardly_a_zero_is_kept_sparse_for_its_low_rank_part(tiny, token_ids):
    prune(tiny, token_ids, sparsity=0.01)
    layers = sparse_layers(tiny)
    assert len(layers) == 14
    assert {layer.format.name for layer in layers.values()} == {"bitmask"}


def test_a_rank_above_the_smaller_side_is_refused_before_the_model_is_touched(tiny, token_ids):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    with pytest.raises(ConfigError, match=r"low_rank=13 .*k_proj.*\(12, 24\).* at most 12"):
        prune(tiny, token_ids, low_rank=13)
    after = tiny.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    prune(tiny, token_ids, low_rank=13, modules_to_not_convert=["k_proj", "v_proj", "lm_head"])
    assert {layer.rank for layer in sparse_layers(tiny).values()} == {13}


def test_it_needs_data(tiny):
    config = SparseConfig(method="magnitude", low_rank=2)
    with pytest.raises(ConfigError, match="low_rank=2 needs calibration data"):
        hf_sparse.prune(tiny, config)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}, {"bits": 4, "group_size": 8}])
def test_it_is_saved_and_reloaded_to_the_bit(tiny, token_ids, tmp_path, dtype, settings):
    tiny.save_pretrained(tmp_path / "dense")  # `to` would cast buffers that stay in fp32, too
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    prune(model, token_ids, **settings)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    again.save_pretrained(tmp_path / "twice", max_shard_size="8KB")
    for file in (tmp_path / "twice").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_loaded_in_a_wider_dtype_the_factors_stay_as_stored(tiny, token_ids, tmp_path):
    prune(tiny.bfloat16(), token_ids)
    tiny.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    own = tiny.get_submodule(UP).low_rank
    assert torch.equal(wide.get_submodule(UP).low_rank.a, own.a)
    assert wide.get_submodule(UP).low_rank.a.dtype == torch.bfloat16
    assert half.get_submodule(UP).low_rank.b.dtype == torch.float16
    assert torch.equal(half.get_submodule(UP).low_rank.b, own.b.half())
    assert logits(wide, token_ids).dtype == torch.float32
    expected = wide.get_submodule(UP).sparse_weight + own.b.float() @ own.a.float()
    torch.testing.assert_close(wide.get_submodule(UP).weight, expected)


def test_the_files_hold_both_factors_and_the_header_the_rank(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        entry = json.loads(file.metadata()["hf_sparse"])["layers"][UP]
    assert entry == {"format": "bitmask", "shape": [40, 24], "low_rank": 3}
    tensors = load_file(tmp_path / "model.safetensors")
    found = {k.removeprefix(f"{UP}."): tuple(t.shape) for k, t in tensors.items() if UP in k}
    assert found == {
        "weight": (480,), "weight_bitmask": (40, 3), KEY_A: (3, 24), KEY_B: (40, 3),
    }  # fmt: skip


def set_nan(tensors):
    tensors[f"{UP}.{KEY_B}"][1, 1] = float("nan")


def cut_short(tensors):
    tensors[f"{UP}.{KEY_A}"] = tensors[f"{UP}.{KEY_A}"][:, :-1].clone()


def make_integers(tensors):
    tensors[f"{UP}.{KEY_A}"] = tensors[f"{UP}.{KEY_A}"].to(torch.int32)


def remove(tensors):
    del tensors[f"{UP}.{KEY_B}"]


def nothing(tensors):
    pass


@pytest.mark.parametrize(
    ("change", "header_change", "message"),
    [
        (set_nan, None, rf"{UP}.{KEY_B} holds NaN"),
        (cut_short, None, rf"{UP}.{KEY_A} has shape \(3, 23\), expected \(3, 24\)"),
        (make_integers, None, rf"{UP}.{KEY_A} has dtype torch.int32"),
        (remove, None, rf"{UP}.{KEY_B} is missing"),
        (nothing, lambda e: e.update(low_rank=4), rf"{UP}.{KEY_A} has shape .* expected \(4, 24\)"),
        (nothing, lambda e: e.update(low_rank=0), rf"{UP}.low_rank is 0, .* takes 1 to 24"),
        (nothing, lambda e: e.update(low_rank=10**9), rf"{UP}.low_rank is 1000000000"),
        (nothing, lambda e: e.update(low_rank="3"), rf"{UP}.low_rank '3' is no integer"),
        (nothing, lambda e: e.update(low_rank=True), rf"{UP}.low_rank True is no integer"),
        (nothing, lambda e: e.pop("low_rank"), rf"{UP}.{KEY_A} doesn't belong"),
    ],
)
def test_damaged_files_are_refused_with_their_name(
    pruned, tmp_path, change, header_change, message
):
    pruned.save_pretrained(tmp_path)
    damage(tmp_path, change, header_change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_plain_transformers_refuses_the_checkpoint(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    result = fresh.run(PLAIN, tmp_path)
    assert result.returncode != 0
    assert "import-hf_sparse-first" in result.stderr


def test_dequantize_and_export_give_plain_layers_with_the_sum(pruned, token_ids, tmp_path):
    expected = logits(pruned, token_ids)
    weights = {name: layer.weight for name, layer in sparse_layers(pruned).items()}
    assert all(int((weight == 0).sum()) == 0 for weight in weights.values())
    hf_sparse.export_dense(pruned, tmp_path)
    export = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = pruned.dequantize()
    assert not sparse_layers(dense)
    for name, weight in weights.items():
        assert torch.equal(dense.get_submodule(name).weight, weight)
        assert torch.equal(export.get_submodule(name).weight, weight)
    torch.testing.assert_close(logits(dense, token_ids), expected)
    assert not [key for key in dense.state_dict() if "low_rank" in key]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_layers_are_pruned_saved_and_reloaded(tiny, token_ids, tmp_path):
    tiny.save_pretrained(tmp_path / "dense")
    prune(tiny, token_ids)
    expected = logits(tiny, token_ids)
    names = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    load = {
        "device_map": {"model.layers.0": "disk", **dict.fromkeys(names, "cpu")},
        "offload_folder": str(tmp_path / "offload"),
    }
    config = SparseConfig(dataset=list(token_ids), low_rank=3)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, **load
    )
    # Offloaded layers multiply by other kernels.
    torch.testing.assert_close(logits(offloaded, token_ids), expected)
    state, _ = sparse_state_dict(offloaded)
    own = tiny.get_submodule(UP).low_rank
    assert torch.equal(state[f"{UP}.{KEY_A}"], own.a)
    assert torch.equal(state[f"{UP}.{KEY_B}"], own.b)
    offloaded.save_pretrained(tmp_path / "sparse")
    load["offload_folder"] = str(tmp_path / "offload2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **load)
    torch.testing.assert_close(logits(again, token_ids), expected)
    hf_sparse.export_low_rank(again, tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(adapter[f"base_model.model.{UP}.lora_B.weight"], own.b)


# --- the adapter --------------------------------------------------------------------------------


@pytest.fixture
def conv(token_ids):
    """Pruned, with layers that were transformers' Conv1D."""
    model = tiny_gpt2()
    prune(model, token_ids)
    return model


@quiet_peft
@pytest.mark.parametrize("kind", ["pruned", "conv"])
def test_the_adapter_on_the_sparse_base_gives_the_same_logits(kind, token_ids, tmp_path, request):
    model = request.getfixturevalue(kind)
    expected = logits(model, token_ids)
    packed = {n: layer.sparse_weight for n, layer in sparse_layers(model).items()}
    hf_sparse.export_low_rank(model, tmp_path / "adapter")
    assert torch.equal(logits(model, token_ids), expected)
    split = hf_sparse.split_low_rank(model)
    torch.testing.assert_close(logits(split, token_ids), expected, rtol=1e-5, atol=1e-5)
    split.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert sparse_layers(base).keys() == packed.keys()
    for name, layer in sparse_layers(base).items():
        assert layer.low_rank is None
        assert torch.equal(layer.weight, packed[name])
    assert (logits(base, token_ids) - expected).abs().max() > 1e-3
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, token_ids), expected, rtol=1e-5, atol=1e-5)
    config = again.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (3, 3, False)


@quiet_peft
def test_ranks_that_differ_are_kept_layer_by_layer_at_scale_1(pruned, token_ids, tmp_path):
    odd = sparse_layers(pruned)["model.layers.1.mlp.down_proj"]
    low_rank = LowRank(odd.low_rank.b[:, :2].contiguous(), odd.low_rank.a[:2].contiguous())
    layer = SparseLinear(
        odd.format, odd.packed, odd.shape, odd.weight_dtype, odd.bias, low_rank=low_rank
    )
    replace_module(pruned, odd, layer)
    expected = logits(pruned, token_ids)
    hf_sparse.export_low_rank(pruned, tmp_path)
    again = PeftModel.from_pretrained(hf_sparse.split_low_rank(pruned).unload(), tmp_path)
    torch.testing.assert_close(logits(again, token_ids), expected, rtol=1e-5, atol=1e-5)
    layers = again.base_model.model.model.layers
    assert layers[1].mlp.down_proj.r["default"] == 2
    assert layers[0].mlp.down_proj.r["default"] == 3
    scales = {m.scaling["default"] for m in again.modules() if isinstance(m, LoraLayer)}
    assert scales == {1.0}


@quiet_peft
@pytest.mark.parametrize("loaded", [False, True])
def test_the_low_rank_part_trains_while_the_sparse_part_stays(pruned, token_ids, tmp_path, loaded):
    hf_sparse.export_low_rank(pruned, tmp_path)
    model = hf_sparse.split_low_rank(pruned)
    if loaded:
        model = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14
    assert all(".lora_" in name for name in trained)
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    losses = losses_of(model, token_ids, optimizer, 4)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, start[n]) for n, parameter in trained.items())
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_appears_whole_or_not_at_all(pruned, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_sparse.training.lora_export.save_file", full)
        with pytest.raises(SaveError, match="No space left"):
            hf_sparse.export_low_rank(pruned, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="it is a file"):
        hf_sparse.export_low_rank(pruned, tmp_path / "file")
    hf_sparse.export_low_rank(pruned, tmp_path / "adapter")
    found = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_written_beside_a_checkpoint_leaves_its_files(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    hf_sparse.export_low_rank(pruned, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("call", ["split_low_rank", "export_low_rank"])
def test_a_model_without_a_low_rank_part_is_refused(tiny, token_ids, tmp_path, call):
    prune(tiny, token_ids, low_rank=0)
    arguments = [tmp_path / "adapter"] if call.startswith("export") else []
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no low-rank part"):
        getattr(hf_sparse, call)(tiny, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_any_module_tree_can_have_low_rank_parts(token_ids):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(61, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    prune(model, [{"input": ids[None]} for ids in token_ids])
    assert [layer.rank for layer in sparse_layers(model).values()] == [3, 3]
