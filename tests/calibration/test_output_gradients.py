"""The output metrics against Jacobians, row by row in double precision, with the same labels."""

import pytest
import torch
from tiny_models import tiny_bert, tiny_t5
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_sparse.calibration.output_gradients import ROWS, collect_metrics
from hf_sparse.core.errors import CalibrationError
from hf_sparse.layers.blocks import find_blocks


def linear_names(model: nn.Module, *without: str) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in without
    ]


def measure(model, batches, *without: str, seed: int = 0):
    """Every batch counts: what is handed over is repeated for the share that is used."""
    names = linear_names(model, *without)
    padded = [batch for batch in batches for _ in range(8)]
    return collect_metrics(model, find_blocks(model, names), padded, seed)


def outputs_of(model, names, batch):
    """Logits and each layer's output, in one graph."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in names
    ]
    result = model(**batch)
    for hook in hooks:
        hook.remove()
    return result, seen


def drawn_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shares = logits.detach().float().softmax(-1)
    return torch.multinomial(shares.reshape(-1, shares.shape[-1]), 1, generator=generator)


def expected_grams(model, names, batches, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sum of d d' over tokens, from the gradient of the labels' log-likelihood in fp64."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    grams = {}
    for batch in batches:
        labels = drawn_labels(model(**batch).logits, generator)
        result, seen = outputs_of(double, names, batch)
        chosen = result.logits.log_softmax(-1).reshape(len(labels), -1).gather(1, labels)
        keep = batch.get("attention_mask")
        if keep is not None and keep.shape == result.logits.shape[:-1]:
            chosen = chosen[keep.flatten().bool()]
        jacobian = torch.autograd.grad(-chosen.sum(), list(seen.values()))
        for name, gradient in zip(seen, jacobian, strict=True):
            rows = gradient.reshape(-1, gradient.shape[-1])
            total = torch.stack([torch.outer(row, row) for row in rows]).sum(dim=0)
            grams[name] = grams.get(name, 0) + total
    return grams


def assert_grams(metrics, expected, tokens: int) -> None:
    assert set(metrics) == set(expected)
    for name, metric in metrics.items():
        gram = expected[name] / tokens
        scale = float(gram.diagonal().mean())
        assert scale > 0
        torch.testing.assert_close(metric.gram.double(), gram, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(metric.diagonal.double(), gram.diagonal(), rtol=1e-3, atol=0)


def test_the_metric_is_the_second_moment_of_the_output_gradients(tiny, token_ids):
    batches = [{"input_ids": token_ids[:2]}, {"input_ids": token_ids[2:5]}]
    metrics = measure(tiny, batches[:1], "lm_head")
    names = linear_names(tiny, "lm_head")
    assert_grams(metrics, expected_grams(tiny, names, batches[:1]), 32)
    padded = [*[batches[0]] * 8, batches[1]]  # every eighth: the first and the last
    metrics = collect_metrics(tiny, find_blocks(tiny, names), padded, 0)
    assert_grams(metrics, expected_grams(tiny, names, batches), 80)


def test_the_head_s_own_metric_is_that_of_the_labels(tiny, token_ids):
    metrics = measure(tiny, [{"input_ids": token_ids[:2]}])
    expected = expected_grams(tiny, linear_names(tiny), [{"input_ids": token_ids[:2]}])
    assert_grams(metrics, expected, 32)


def test_padding_is_left_out(tiny, token_ids):
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0, 5:], mask[2, 12:] = 0, 0
    batch = {"input_ids": token_ids[:3], "attention_mask": mask}
    metrics = measure(tiny, [batch], "lm_head")
    names = linear_names(tiny, "lm_head")
    assert_grams(metrics, expected_grams(tiny, names, [batch]), 48)
    unmasked = measure(tiny, [{"input_ids": token_ids[:3]}], "lm_head")
    last = "model.layers.1.mlp.down_proj"
    assert not torch.allclose(unmasked[last].gram, metrics[last].gram, rtol=0.05)


def test_an_encoder_s_padding_masks_no_label_of_the_decoder(token_ids):
    model, mask = tiny_t5(num_layers=1), torch.ones(2, 16, dtype=torch.long)
    mask[:, 3:] = 0
    batch = {
        "input_ids": token_ids[:2],
        "attention_mask": mask,
        "decoder_input_ids": token_ids[2:4],
    }
    metrics = measure(model, [batch], "lm_head")
    names = linear_names(model, "lm_head")
    last = "decoder.block.0.layer.2.DenseReluDense.wo"
    generator = torch.Generator().manual_seed(0)
    result, seen = outputs_of(model, [last], batch)
    labels = drawn_labels(result.logits, generator)
    chosen = result.logits.log_softmax(-1).reshape(len(labels), -1).gather(1, labels)
    (gradient,) = torch.autograd.grad(-chosen.sum(), [seen[last]])
    rows = gradient.reshape(-1, gradient.shape[-1])
    assert len(rows) == 32
    torch.testing.assert_close(metrics[last].gram, rows.T @ rows / 32, rtol=1e-3, atol=1e-5)
    assert set(metrics) == set(names)


def test_a_model_without_logits_predicts_all_its_outputs(token_ids):
    model = tiny_bert(BertModel)
    metrics = measure(model, [{"input_ids": token_ids[:4]}])
    # The pooler's output is another than the blocks'.
    assert "pooler.dense" in metrics
    assert all(bool((m.diagonal > 0).all()) for m in metrics.values())
    # y ~ N(mean, 1) has the identity as its Fisher information: E[d d'] = J'J.
    result, seen = outputs_of(model, ["pooler.dense"], {"input_ids": token_ids[:4]})
    slopes = 1 - seen["pooler.dense"].detach().tanh().square()
    assert torch.equal(result.pooler_output, seen["pooler.dense"].tanh())
    many = [measure(model, [{"input_ids": token_ids[:4]}], seed=s) for s in range(60)]
    mean = torch.stack([m["pooler.dense"].diagonal for m in many]).mean(dim=0)
    expected = slopes.square().sum(dim=0) / 64
    torch.testing.assert_close(mean, expected, rtol=0.4, atol=0)
    assert float((mean / expected).mean()) == pytest.approx(1, abs=0.1)


def test_a_regression_head_is_no_class(token_ids):
    model = tiny_bert(BertForSequenceClassification, num_labels=1)
    metrics = measure(model, [{"input_ids": token_ids[:4]}])
    assert all(bool(m.diagonal.any()) for m in metrics.values())


def test_a_labelled_batch_s_loss_is_no_output(token_ids):
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.embed = nn.Embedding(61, 8)

        def forward(self, input_ids):
            y = self.layer(self.embed(input_ids))
            return {"loss": 1e6 * y.sum(), "values": y}

    torch.manual_seed(0)
    found = measure(Labelled().eval(), [{"input_ids": token_ids}])["layer"]
    # y is the mean of block normals itself: d ~ N(0, 1).
    torch.testing.assert_close(found.diagonal, torch.ones(4), rtol=0.5, atol=0)


def wide() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=ROWS + 44,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def test_wide_layers_keep_the_exact_diagonal_and_an_unbiased_sketch():
    model = wide()
    ids = torch.randint(3, 31, (2, 10), generator=torch.Generator().manual_seed(0))
    names = linear_names(model, "lm_head")
    name = "model.layers.0.mlp.up_proj"
    expected = expected_grams(model, names, [{"input_ids": ids}])[name] / 20
    sketches = []
    labels = torch.Generator().manual_seed(0).get_state()
    for seed in range(30):
        # The same labels each time, other signs.
        sketches.append(sketch(model, names, ids, labels, seed)[name])
    for metric in sketches:
        assert metric.gram is None
        assert metric.sketch.shape == (ROWS, ROWS + 44)
        torch.testing.assert_close(
            metric.diagonal.double(), expected.diagonal(), rtol=1e-3, atol=1e-12
        )
    mean = torch.stack([m.sketch.T @ m.sketch for m in sketches]).mean(dim=0).double()
    # F'F of 30 x 256 random signs over 20 tokens is off by about sqrt(20 / 7680) of G's norm.
    error = float((mean - expected).norm() / expected.norm())
    assert error < 0.1
    assert float(mean.trace() / expected.trace()) == pytest.approx(1, abs=0.02)


def sketch(model, names, ids, labels, seed):
    """Metrics with the labels of one generator state and the signs of a seed."""
    original = torch.multinomial

    def same_labels(shares, count, generator):
        fixed = torch.Generator()
        fixed.set_state(labels)
        return original(shares, count, generator=fixed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", same_labels)
        return collect_metrics(model, find_blocks(model, names), [{"input_ids": ids}], seed)


def test_the_seed_draws_the_labels(tiny, token_ids):
    batch, name = [{"input_ids": token_ids[:2]}], "model.layers.0.mlp.up_proj"
    one, again, other = (measure(tiny, batch, "lm_head", seed=s)[name].gram for s in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def state(model: nn.Module):
    return [
        (
            name,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            module.__dict__.get("forward"),
            {key: p.requires_grad for key, p in module.named_parameters(recurse=False)},
            {key: p.grad for key, p in module.named_parameters(recurse=False)},
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_afterwards_also_after_an_exception(tiny, token_ids, fails):
    tiny.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    own = tiny.model.layers[1].forward
    tiny.model.layers[1].forward = own  # as accelerate's hooks do
    before, use_cache = state(tiny), tiny.config.use_cache
    if fails:
        ids = token_ids[:1].clone()
        ids[0, 3] = 10_000
        with pytest.raises(CalibrationError, match="can't run on the calibration data"):
            measure(tiny, [{"input_ids": ids}], "lm_head")
    else:
        measure(tiny, [{"input_ids": token_ids[:1]}], "lm_head")
    assert state(tiny) == before
    assert tiny.config.use_cache == use_cache
    assert tiny.model.layers[1].__dict__["forward"] is own
    assert "forward" not in tiny.model.layers[0].__dict__


def test_parameters_of_offloaded_modules_get_their_gradients_back(tiny, token_ids):
    from accelerate import cpu_offload

    expected = measure(tiny, [{"input_ids": token_ids[:2]}], "lm_head")
    tiny.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in tiny.named_parameters()}
    cpu_offload(tiny, torch.device("cpu"))
    found = measure(tiny, [{"input_ids": token_ids[:2]}], "lm_head")
    assert {name: p.requires_grad for name, p in tiny.named_parameters()} == before
    assert sum(before.values()) == len(before) - 1
    for name, metric in found.items():
        torch.testing.assert_close(metric.gram, expected[name].gram)


def test_no_parameter_gets_a_gradient(tiny, token_ids):
    measure(tiny, [{"input_ids": token_ids[:1]}], "lm_head")
    assert all(p.grad is None for p in tiny.parameters())


@pytest.mark.parametrize("how", ["detached", "unused"])
def test_a_layer_that_no_gradient_reaches_has_no_metric(tiny, token_ids, how):
    mlp = tiny.model.layers[0].mlp
    if how == "detached":
        mlp.register_forward_hook(lambda m, args, output: output.detach())
    else:
        mlp.register_forward_hook(lambda m, args, output: 0 * output)
    found = measure(tiny, [{"input_ids": token_ids[:1]}], "lm_head")
    assert not any("layers.0.mlp" in name for name in found)
    assert "model.layers.1.mlp.gate_proj" in found


def test_a_model_that_gives_no_gradient_at_all_is_an_error(tiny, token_ids):
    tiny.register_forward_hook(lambda m, args, output: {"logits": output.logits.detach()})
    with pytest.raises(CalibrationError, match="LlamaForCausalLM gives no gradient"):
        measure(tiny, [{"input_ids": token_ids[:1]}], "lm_head")


@pytest.mark.parametrize("where", ["logits", "gradients"])
def test_what_is_not_finite_is_an_error(tiny, token_ids, where):
    if where == "logits":
        tiny.lm_head.weight.data[5] = torch.nan
        match = "logits are NaN"
    else:
        output = tiny.model.layers[1]
        output.register_forward_hook(
            lambda m, args, x: (x.register_hook(lambda g: g * torch.inf), x)[1]
        )
        match = "gradients of its outputs are not finite"
    with pytest.raises(CalibrationError, match=match):
        measure(tiny, [{"input_ids": token_ids[:1]}], "lm_head")
