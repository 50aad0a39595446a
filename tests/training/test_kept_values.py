"""Trained values: their gradient is the dense weight's at the kept places; the rest stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear, TrainingError
from hf_sparse.core.low_rank import KEY_A, KEY_B, LowRank
from hf_sparse.formats import Bitmask
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import reference
from hf_sparse.layers.held import VALUES
from hf_sparse.training import finish_training, prepare_for_training

FORMATS = {"bitmask": Bitmask(), "2:4": NMPacked(2, 4), "3:8": NMPacked(3, 8)}
every_format = pytest.mark.parametrize("name", FORMATS)
# (out, in): ragged tails of 4 and of 8, rows that are no multiple of a tile's, one row, one column.
SHAPES = [(5, 11), (1, 7), (33, 16), (7, 1), (3, 29)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def kept_places(name, shape):
    """A mask that the format stores, by loops."""
    rows, columns = shape
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    if name == "bitmask":
        return torch.rand(shape, generator=generator) < 0.4
    mask = torch.zeros(shape, dtype=torch.bool)
    for row in range(rows):
        for start in range(0, columns, fmt.m):
            width = min(fmt.m, columns - start)
            kept = -(-fmt.n * width // fmt.m)
            for place in torch.randperm(width, generator=generator)[:kept].tolist():
                mask[row, start + place] = True
    return mask


def make_layer(name, shape, dtype=torch.float32, bias=True, low_rank=None):
    """A sparse layer with trained values, and the mask of its weight."""
    generator = torch.Generator().manual_seed(1)
    mask = kept_places(name, shape)
    weight = (torch.randn(shape, generator=generator).to(dtype)).where(mask, 0)
    own_bias = nn.Parameter(torch.randn(shape[0], generator=generator).to(dtype)) if bias else None
    fmt = FORMATS[name]
    layer = SparseLinear(fmt, fmt.pack(weight), shape, dtype, own_bias, low_rank=low_rank)
    layer.train_values(dtype)
    return layer, mask


def normal(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_gradient_by_loops(mask, x, upstream):
    """sum over tokens of dy_i x_j for each kept (i, j), row by row, in float64."""
    x, upstream = x.double().reshape(-1, x.shape[-1]), upstream.double().flatten(0, -2)
    found = []
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            if mask[i, j]:
                found.append(sum(upstream[t, i] * x[t, j] for t in range(len(x))))
    return torch.tensor([float(value) for value in found], dtype=torch.float64)


@every_format
@every_shape
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_of_values_is_the_dense_weight_s_at_the_kept_places(name, shape, bias):
    layer, mask = make_layer(name, shape, bias=bias)
    x, upstream = normal(2, 3, shape[1]), normal(2, 3, shape[0], seed=3)
    (layer(x) * upstream).sum().backward()
    expected = values_gradient_by_loops(mask, x, upstream)
    grad = layer.weight_values.grad
    assert grad.shape == layer.packed["weight"].shape
    torch.testing.assert_close(grad.flatten().double(), expected, rtol=1e-5, atol=1e-5)


@every_format
@every_shape
def test_values_input_and_bias_agree_with_finite_differences(name, shape):
    layer, _ = make_layer(name, shape, torch.float64)
    x = normal(2, shape[1]).double().requires_grad_()

    def product(x, values, bias):
        parameters = {VALUES: values, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.weight_values, layer.bias))


@every_format
def test_the_gradient_is_the_same_a_few_rows_at_a_time(name, monkeypatch):
    layer, _ = make_layer(name, (33, 29))
    x = normal(4, 29)
    layer(x).square().sum().backward()
    whole = layer.weight_values.grad.clone()
    layer.weight_values.grad = None
    monkeypatch.setattr(reference, "LARGEST_BLOCK", 5 * 29)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_values.grad, whole)


@every_format
def test_no_tokens_give_a_gradient_of_zeros(name):
    layer, _ = make_layer(name, (5, 11))
    layer(normal(0, 11)).sum().backward()
    assert not layer.weight_values.grad.any()


@every_format
def test_a_gradient_in_bf16_is_rounded_once_however_many_tokens_it_sums(name):
    layer, mask = make_layer(name, (5, 11), torch.bfloat16)
    x, upstream = normal(4096, 11).bfloat16(), normal(4096, 5, seed=3).bfloat16()
    layer(x).backward(upstream)
    exact = (upstream.double().T @ x.double())[mask]
    assert layer.weight_values.grad.dtype == torch.bfloat16
    # Half a block in the last of 8 bits, and what fp32 sums are off.
    difference = (layer.weight_values.grad.flatten().double() - exact).abs()
    assert bool((difference <= exact.abs() / 256 + 1e-3).all())


@every_format
def test_values_in_fp32_serve_inputs_in_bf16(name):
    layer, _ = make_layer(name, (5, 11), torch.bfloat16)
    layer.fix_values()
    layer.train_values(torch.float32)
    x = normal(7, 11).bfloat16()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight_values.dtype == layer.weight_values.grad.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16


@every_format
def test_autocast_gives_the_gradients_of_a_dense_layer(name):
    layer, mask = make_layer(name, (5, 11))
    dense = layer.weight.detach().clone().requires_grad_()
    x, reference_x = (normal(6, 11).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = F.linear(reference_x, dense, layer.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert layer.weight_values.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight_values.grad.flatten(), dense.grad[mask])
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=0.02, atol=0.02)


@every_format
def test_reading_the_weight_itself_is_differentiable_too(name):
    # Some models multiply with `layer.weight`.
    layer, mask = make_layer(name, (5, 11))
    x, upstream = normal(3, 11), normal(3, 5, seed=3)
    (F.linear(x, layer.weight) * upstream).sum().backward()
    expected = values_gradient_by_loops(mask, x, upstream)
    grad = layer.weight_values.grad.flatten().double()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@every_format
def test_frozen_values_get_no_gradient_and_keep_no_input(name):
    layer, _ = make_layer(name, (5, 11))
    layer.weight_values.requires_grad_(False)
    x = normal(3, 11).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight_values.grad is None
    assert x.untyped_storage().data_ptr() not in saved


@every_format
def test_finished_values_are_a_buffer_in_the_weight_s_dtype_again(name):
    layer, mask = make_layer(name, (5, 11), torch.bfloat16)
    layer.fix_values()
    layer.train_values(torch.float32)
    with torch.no_grad():
        layer.weight_values.mul_(1.001)
    trained = layer.weight_values.detach().clone()
    layer.fix_values()
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    assert torch.equal(layer.weight[mask], trained.flatten().bfloat16())
    assert not layer.trains_values


@every_format
def test_a_move_or_cast_keeps_the_parameter_an_optimiser_holds(name):
    layer, _ = make_layer(name, (5, 11))
    parameter = layer.weight_values
    layer.double()
    assert layer.weight_values is parameter
    assert parameter.dtype == layer.weight.dtype == torch.float64


@every_format
def test_copies_train_apart(name):
    layer, _ = make_layer(name, (5, 11))
    other = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        other.weight_values.zero_()
    assert isinstance(other.weight_values, nn.Parameter)
    assert torch.equal(layer.weight, before)


@every_format
def test_the_stored_bytes_of_trained_values_are_told(name):
    layer, _ = make_layer(name, (5, 11))
    assert layer.resident_bytes() == sum(tensor.nbytes for tensor in layer.packed.values())


def test_a_low_rank_part_is_trained_with_the_values():
    factors = LowRank(normal(5, 2), normal(2, 11, seed=5))
    layer, _ = make_layer("bitmask", (5, 11), low_rank=factors)
    assert [n for n, _ in layer.named_parameters()] == ["bias", VALUES, KEY_A, KEY_B]
    layer(normal(3, 11)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
    layer.fix_values()
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    torch.testing.assert_close(layer.low_rank.a, factors.a)


@every_format
def test_a_state_dict_under_the_files_names_loads(name):
    layer, _ = make_layer(name, (5, 11))
    other, _ = make_layer(name, (5, 11))
    with torch.no_grad():
        other.weight_values.zero_()
    state = {k.replace(VALUES, "weight"): v for k, v in layer.state_dict().items()}
    assert "weight" in state
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other.weight, layer.weight)


# --- whole models ---------------------------------------------------------------------------


@pytest.fixture
def sparse(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.5))
    return tiny


def test_a_prepared_model_computes_what_it_did_and_so_does_a_finished_one(sparse, token_ids):
    with torch.no_grad():
        before = sparse(token_ids).logits
        prepare_for_training(sparse)
        prepare_for_training(sparse)  # again: nothing more happens
        prepared = sparse(token_ids).logits
        finish_training(sparse)
        finished = sparse(token_ids).logits
    torch.testing.assert_close(prepared, before)
    assert torch.equal(finished, before)
    assert not sparse.hf_quantizer.is_qat_trainable


def test_an_optimiser_of_adam_holds_two_numbers_a_kept_weight(sparse, token_ids):
    kept = sum(int((m.weight != 0).sum()) for m in sparse.modules() if isinstance(m, SparseLinear))
    prepare_for_training(sparse)
    layers = [m for m in sparse.modules() if isinstance(m, SparseLinear)]
    optimiser = torch.optim.AdamW([layer.weight_values for layer in layers])
    sparse(token_ids, labels=token_ids).loss.backward()
    optimiser.step()
    moments = ("exp_avg", "exp_avg_sq")
    states = [optimiser.state[layer.weight_values][key] for layer in layers for key in moments]
    assert sum(state.nbytes for state in states) == 2 * kept * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_trained_values_are_saved_in_the_same_format(tiny, token_ids, tmp_path, dtype, pattern):
    tiny.to(dtype)
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", pattern=pattern))
    masks = {n: m.weight != 0 for n, m in tiny.named_modules() if isinstance(m, SparseLinear)}
    formats = {n: tiny.get_submodule(n).format for n in masks}
    prepare_for_training(tiny, dtype)
    optimiser = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for _ in range(2):
        tiny(token_ids, labels=token_ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tiny.eval()
    tiny.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    for name, mask in masks.items():
        layer = again.get_submodule(name)
        assert layer.format == formats[name]
        assert torch.equal(layer.weight, tiny.get_submodule(name).weight)
        assert torch.equal(layer.weight != 0, mask)
    with torch.no_grad():
        rtol = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(
            again(token_ids).logits, tiny(token_ids).logits, rtol=rtol, atol=rtol
        )
        assert tiny.generate(token_ids[:1], max_new_tokens=3, do_sample=False).shape[1] == 19


def test_quantised_layers_are_refused_by_name(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.5, bits=8))
    with pytest.raises(TrainingError, match=r"layers\.0\.self_attn\.q_proj holds codes of 8 bits"):
        prepare_for_training(tiny)
    assert not any(name.endswith(VALUES) for name, _ in tiny.named_parameters())


def test_a_dense_model_is_refused(tiny):
    with pytest.raises(TrainingError, match="LlamaForCausalLM has no sparse layer"):
        prepare_for_training(tiny)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_a_model_with_adapters_is_refused(sparse):
    adapted = get_peft_model(sparse, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="has adapters"):
        prepare_for_training(adapted)


def test_a_dtype_that_can_not_be_trained_in_is_refused(sparse):
    with pytest.raises(TrainingError, match=r"dtype=torch\.float16 can't be trained in"):
        prepare_for_training(sparse, torch.float16)


def test_offloaded_layers_are_refused(sparse):
    layer = sparse.model.layers[1].mlp.up_proj
    sparse.model.layers[1].mlp.up_proj = layer.to("meta")
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.up_proj is offloaded"):
        prepare_for_training(sparse)
