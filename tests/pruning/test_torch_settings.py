"""A run does not depend on what a user has set for the whole process, and leaves it as it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

import hf_sparse
from hf_sparse import SparseConfig


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "bf16 by default": lambda: default_dtype(torch.bfloat16),
    "fp64 by default": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "deterministic": deterministic,
}


def pruned(model, token_ids, **arguments):
    config = SparseConfig(dataset=[{"input_ids": token_ids}], **arguments)
    hf_sparse.prune(model, config)
    return weights(model)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


TOKENS = torch.randint(3, 61, (12, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["sparsegpt", "best"])
def expected(request):
    """A method, and the weights that it leaves where nothing is set."""
    return request.param, pruned(tiny_llama(num_hidden_layers=1), TOKENS, method=request.param)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_weights_are_those_without_the_setting(expected, setting):
    (method, expected), model = expected, tiny_llama(num_hidden_layers=1)
    with SETTINGS[setting]():
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        config = SparseConfig(dataset=[{"input_ids": TOKENS}], method=method)
        hf_sparse.prune(model, config)
        assert torch.get_default_dtype() is dtype
        assert torch.get_default_device() == device
    found = weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    assert not any(p.is_inference() for p in model.parameters())


def test_a_model_that_was_made_in_inference_mode_can_be_pruned_there_and_trained_outside(
    tiny, token_ids
):
    with torch.inference_mode():
        model = type(tiny)(tiny.config).eval()
        pruned(model, token_ids, method="best")
    model(token_ids, labels=token_ids).loss.backward()
    assert bool(model.model.embed_tokens.weight.grad.any())


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_pruned_as_it_was_written_and_computes_with_the_sparse_layers(
    tiny, token_ids, in_place
):
    plain = copy.deepcopy(tiny)
    expected = pruned(plain, token_ids)
    model = copy.deepcopy(tiny)
    if in_place:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(token_ids)
    hf_sparse.prune(compiled, SparseConfig(dataset=[{"input_ids": token_ids}]))
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        torch.testing.assert_close(compiled(token_ids).logits, plain(token_ids).logits)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids, attention_mask):
        return self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_s_own_transformer_layers_are_pruned_without_their_fused_kernel(token_ids):
    torch.manual_seed(0)
    model, mask = Encoder().eval(), torch.ones_like(token_ids)
    mask[1:, 5:] = 0
    data = [{"input_ids": token_ids, "attention_mask": mask}]
    report = hf_sparse.prune(model, SparseConfig(dataset=data))
    assert {layer.tokens for layer in report.layers} == {int(mask.sum())}
    assert len(report.layers) == 4
    dense = report.left_dense["encoder.layers.0.self_attn"]
    assert "multiplies by its weights itself" in dense


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_what_a_config_tells_the_model_to_return_is_not_made(tiny, token_ids, flag):
    model = copy.deepcopy(tiny)
    model.set_attn_implementation("eager")
    setattr(model.config, flag, True)
    returned = []
    model.register_forward_hook(lambda m, args, output: returned.append(output))
    hf_sparse.prune(model, SparseConfig(dataset=[{"input_ids": token_ids}]))
    assert returned
    assert all(out.attentions is None and out.hidden_states is None for out in returned)
    assert getattr(model.config, flag) is True


def test_each_module_is_in_its_own_mode_again(tiny, token_ids):
    model = copy.deepcopy(tiny).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    pruned(model, token_ids)
    assert {name: module.training for name, module in model.named_modules()} == before
