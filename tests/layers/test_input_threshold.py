"""Small inputs count as 0, the same in every product, and are saved with the layer."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear
from hf_sparse.core.errors import AdapterError, CheckpointError, ConfigError
from hf_sparse.core.input_threshold import InputThreshold
from hf_sparse.core.low_rank import LowRank
from hf_sparse.formats import Bitmask, Dense

IDS = [torch.randint(3, 61, (16,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
SETTINGS = {"dataset": IDS, "num_samples": 4, "seq_len": 16, "input_sparsity": 0.4}
THRESHOLD = InputThreshold(0.5, 0.4)


def pruned(**changes):
    model = tiny_llama()
    hf_sparse.prune(model, SparseConfig(method="magnitude", **(SETTINGS | changes)))
    return model


def layer(fmt=None, low_rank=None) -> tuple[SparseLinear, torch.Tensor]:
    """A layer with a threshold of 0.5, and its whole weight."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 14, generator=random)
    fmt = fmt or Bitmask()
    weight[:, ::2] *= fmt.name == "dense"
    whole = weight if low_rank is None else weight + low_rank.product()
    packed = fmt.pack(weight)
    return SparseLinear(
        fmt, packed, (9, 14), torch.float32, None, low_rank=low_rank, threshold=THRESHOLD
    ), whole


def test_the_threshold_is_the_value_that_the_share_does_not_exceed():
    inputs = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    sizes = np.sort(np.abs(inputs.numpy()).ravel())
    threshold = InputThreshold.of(inputs, 0.25)
    assert threshold.value == sizes[int(0.25 * 350) - 1]
    assert int((threshold.apply(inputs) == 0).sum()) == int(0.25 * 350)


@pytest.mark.parametrize("resolved", [False, True])
@pytest.mark.parametrize("fmt", [Bitmask(), Dense()], ids=["bitmask", "dense"])
@pytest.mark.parametrize("shape", [(14,), (1, 14), (3, 14), (40, 14)])
def test_every_product_is_that_of_the_inputs_above_the_threshold(resolved, fmt, shape):
    sparse, weight = layer(fmt)
    if resolved:
        sparse.resolve()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = torch.where(x.abs() > 0.5, x, 0.0).double() @ weight.double().T
    for given in (x, x.requires_grad_()):
        torch.testing.assert_close(sparse(given).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_low_rank_part_has_the_same_inputs():
    low_rank = LowRank(torch.ones(9, 2), torch.ones(2, 14))
    sparse, weight = layer(low_rank=low_rank)
    sparse.resolve()
    x = torch.linspace(-1, 1, 14)
    expected = torch.where(x.abs() > 0.5, x, 0.0) @ weight.T
    torch.testing.assert_close(sparse(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_the_product_with_small_inputs_left_out(trained):
    sparse, weight = layer()
    sparse.train_values(torch.float32) if trained else sparse.resolve()
    x = torch.linspace(-1, 1, 28).view(2, 14).requires_grad_()
    sparse(x).sum().backward()
    stays = (x.abs() > 0.5).float()
    torch.testing.assert_close(x.grad, stays * weight.sum(0))
    if trained:
        dense = (stays * x.detach()).sum(0).expand(9, 14)
        torch.testing.assert_close(sparse.weight_values.grad, dense[weight != 0])
    _, tangent = torch.func.jvp(sparse, (x.detach(),), (torch.ones(2, 14),))
    torch.testing.assert_close(tangent, stays @ weight.T)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_layer_leaves_small_inputs_out_of_other_tokens_too():
    sparse, weight = layer()
    sparse.resolve()
    traced = torch.jit.trace(sparse, torch.zeros(1, 14))
    x = torch.linspace(-1, 1, 14).unsqueeze(0)
    torch.testing.assert_close(traced(x), torch.where(x.abs() > 0.5, x, 0.0) @ weight.T)


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_thresholds_are_saved_with_the_model_and_hold_when_it_is_loaded(tmp_path, sparsity):
    model = pruned(sparsity=sparsity)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = (
        {n: m.threshold for n, m in each.named_modules() if isinstance(m, SparseLinear)}
        for each in (model, loaded)
    )
    assert before == after
    assert len(after) == 14
    assert all(threshold.value > 0 for threshold in after.values())
    ids = IDS[0].unsqueeze(0)
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.hf_quantizer.quantization_config.input_sparsity == 0.4
    note = loaded.hf_quantizer.report.layers[0].notes[-1]
    assert note.startswith("inputs of at most ")
    assert "14 count 40% of their inputs as 0" in str(hf_sparse.explain(loaded))


def test_keep_prunes_nothing_and_skips_inputs_alone():
    model = tiny_llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inputs: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach())
    )
    for ids in IDS:
        model(ids.unsqueeze(0))
    hook.remove()
    hf_sparse.prune(model, SparseConfig(method="keep", **SETTINGS))
    up = model.model.layers[0].mlp.up_proj
    assert torch.equal(up.weight, state["model.layers.0.mlp.up_proj.weight"])
    assert up.threshold == InputThreshold.of(torch.cat(inputs).flatten(0, 1), 0.4)
    dense = model.dequantize()
    assert torch.equal(dense(IDS[:1][0][None]).logits, tiny_llama()(IDS[:1][0][None]).logits)


def test_skipping_the_inputs_of_codes_is_an_error():
    with pytest.raises(ConfigError, match="gain nothing with bits=4"):
        SparseConfig(**SETTINGS, bits=4)


@pytest.mark.parametrize("share", [0, 1, 40, -0.1, "0.4", True])
def test_a_share_that_is_none_is_an_error(share):
    with pytest.raises(ConfigError, match="input_sparsity="):
        SparseConfig(**(SETTINGS | {"input_sparsity": share}))


def test_a_threshold_needs_data():
    with pytest.raises(ConfigError, match=r"input_sparsity=0.4 needs calibration data"):
        hf_sparse.prune(tiny_llama(), SparseConfig(method="magnitude", input_sparsity=0.4))


@pytest.mark.parametrize("value", [-1.0, "0.1", None, True, 1e999])
def test_a_damaged_threshold_is_an_error_that_names_the_layer(tmp_path, value):
    pruned().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    described = json.loads(metadata["hf_sparse"])
    described["layers"]["model.layers.0.mlp.up_proj"]["input_threshold"] = value
    metadata["hf_sparse"] = json.dumps(described)
    save_file(load_file(file), file, metadata)
    with pytest.raises(CheckpointError, match=r"up_proj.*input_threshold|not JSON|Infinity"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


OLD_NAME = "ignore::FutureWarning"  # PEFT asks transformers by it
ADDED = [
    LoraConfig(target_modules=["up_proj"], init_lora_weights=False),
    LoraConfig(target_modules=["up_proj"], init_lora_weights=False, use_dora=True),
    LoHaConfig(target_modules=["up_proj"], init_weights=False),
    IA3Config(target_modules=["up_proj"], feedforward_modules=[], init_ia3_weights=False),
]
BEFORE_THE_LAYER = [
    OFTConfig(target_modules=["up_proj"], init_weights=False, oft_block_size=8, r=0),
    BOFTConfig(target_modules=["up_proj"], init_weights=False, boft_block_size=8),
    IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"], init_ia3_weights=False),
]


def kind(config):
    return config.peft_type.value + "+dora" * getattr(config, "use_dora", False)


@pytest.mark.filterwarnings("ignore:A weight that does not fit", OLD_NAME)
@pytest.mark.parametrize("pruned_first", [True, False])
@pytest.mark.parametrize("config", ADDED, ids=kind)
@torch.no_grad()
def test_an_adapter_beside_a_threshold_computes_what_it_does_when_it_is_merged(
    config, pruned_first
):
    model = pruned() if pruned_first else tiny_llama()
    plain = model(IDS[0][None]).logits
    adapted = get_peft_model(model, copy.deepcopy(config)).eval()
    if not pruned_first:
        hf_sparse.prune(adapted, SparseConfig(method="magnitude", **SETTINGS))
    beside = adapted(IDS[0][None]).logits
    assert not torch.allclose(beside, plain, atol=1e-3)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    layer.merge()
    weight, threshold = layer.get_base_layer().weight, layer.get_base_layer().threshold
    expected = torch.where(x.abs() > threshold.value, x, 0.0) @ weight.T
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings(OLD_NAME, "ignore::UserWarning:peft")
@pytest.mark.parametrize("config", BEFORE_THE_LAYER, ids=kind)
def test_an_adapter_that_changes_inputs_before_a_threshold_is_not_merged(config):
    adapted = get_peft_model(pruned(), copy.deepcopy(config)).eval()
    for merge in (
        adapted.merge_adapter,
        adapted.merge_and_unload,
        lambda: hf_sparse.merge_adapter(adapted),
    ):
        with pytest.raises(AdapterError, match=r"takes inputs up to .* for 0, and its adapter"):
            merge()
