"""The report is true of the file, and wrappers and adapters change nothing of what is pruned."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import hf_sparse
from hf_sparse import ConfigError, SolveError, SparseConfig


@pytest.fixture
def config(token_ids):
    return SparseConfig(dataset=[{"input_ids": token_ids}])


def test_a_weight_that_a_hook_writes_anew_is_an_error_and_no_false_report(tiny, config):
    model = copy.deepcopy(tiny)
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight.detach().clone()

    def write(module, args):
        module.weight.data.copy_(weight)

    layer.register_forward_pre_hook(write)
    with pytest.raises(SolveError, match=r"layers\.0\.mlp\.up_proj has 0 zeros in the weight that"):
        hf_sparse.prune(model, config)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_the_other_layers_of_a_model_with_weight_norm_are_pruned(tiny, config, norm, tmp_path):
    model = copy.deepcopy(tiny)
    norm(model.model.layers[0].mlp.up_proj)
    report = hf_sparse.prune(model, config)
    assert len(report.layers) == 13
    assert "layer, 'weight') first" in report.left_dense["model.layers.0.mlp.up_proj"]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for layer in report.layers:
        kept = int(saved[f"{layer.name}.weight"].count_nonzero())
        assert kept == math.prod(layer.shape) - layer.zeros


def test_a_model_with_a_quantised_head_is_pruned_as_with_a_dense_one(tiny, config):
    config.method = "sparsegpt"
    plain, quantised = copy.deepcopy(tiny), copy.deepcopy(tiny)
    weight = quantised.lm_head.weight.detach()
    quantised.lm_head.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    hf_sparse.prune(plain, config)
    hf_sparse.prune(quantised, config)
    for expected, layer in zip(plain.model.layers, quantised.model.layers, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, expected.mlp.up_proj.weight)


def test_hooks_of_a_layer_go_along_when_it_is_replaced(tiny, config, token_ids):
    model = copy.deepcopy(tiny)
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    hf_sparse.prune(model, config)
    seen.clear()
    model(token_ids)
    assert seen == [1]
    handle.remove()
    model(token_ids)
    assert seen == [1]


def adapted(tiny):
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(tiny), lora)


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_left_alone_and_what_they_wrap_is_pruned(tiny, config, token_ids, tmp_path):
    model = adapted(tiny)
    adapters = {n: t.clone() for n, t in model.state_dict().items() if "lora" in n}
    report = hf_sparse.prune(model, config)
    names = {layer.name for layer in report.layers}
    assert "model.layers.0.self_attn.q_proj.base_layer" in names
    assert len(names) == 14
    assert "lm_head" in report.left_dense
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in adapters.items())
    model(token_ids, labels=token_ids).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_is_merged_into_its_layer_is_an_error(tiny, config):
    model = adapted(tiny)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        hf_sparse.prune(model, config)


class Holder(nn.Module):
    """A model of one's own around one of transformers'."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, Holder])
def test_what_stays_dense_in_a_wrapper_is_what_stays_dense_without(tiny, config, wrap):
    expected = hf_sparse.prune(copy.deepcopy(tiny), config)
    found = hf_sparse.prune(wrap(copy.deepcopy(tiny)), config)
    prefix = "inner." if wrap is Holder else ""
    assert [x.name for x in found.layers] == [prefix + x.name for x in expected.layers]
    assert set(found.left_dense) == {prefix + name for name in expected.left_dense}


def test_what_modules_to_not_convert_exposes_is_told(tiny, caplog):
    names = ["q_proj"]
    config = SparseConfig(method="magnitude", modules_to_not_convert=names)
    report = hf_sparse.prune(copy.deepcopy(tiny), config)
    assert "lm_head" in {layer.name for layer in report.layers}
    assert "lm_head (it belongs to the output head) will be pruned" in caplog.text


class Sharing(nn.Module):
    """Two blocks with one layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        shared = nn.Linear(6, 6)
        for layer in self.layers:
            layer.append(shared)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_layer_that_two_blocks_share_is_solved_on_the_tokens_of_both():
    torch.manual_seed(0)
    data = [{"x": torch.randn(50, 6)}]
    report = hf_sparse.prune(Sharing().eval(), SparseConfig(dataset=data))
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens == {"layers.0.0": 50, "layers.0.2": 100, "layers.1.0": 50}


class Experts(nn.Module):
    """Calls every expert, the last one without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        chosen = self.gate(x)[:, :2].argmax(dim=-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return y


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda"])
def test_an_expert_that_is_called_without_rows_stays_dense_with_a_warning(method, caplog):
    torch.manual_seed(0)
    config = SparseConfig(dataset=[{"x": torch.randn(50, 6)}], method=method)
    report = hf_sparse.prune(Experts(), config)
    assert [layer.name for layer in report.layers] == ["experts.0", "experts.1"]
    assert report.left_dense["experts.2"] == "no calibration token reached it"
    assert report.left_dense["gate"] == "it routes tokens to experts"
    assert "experts.2" in caplog.text


def test_modules_whose_layers_have_no_biases_are_pruned_to_the_last_parameter():
    stack = nn.Sequential(nn.Linear(8, 8, bias=False))
    report = hf_sparse.prune(stack, SparseConfig(method="magnitude", sparsity=0.5))
    assert report.environment.device == "cpu"
    assert not list(stack.parameters())
