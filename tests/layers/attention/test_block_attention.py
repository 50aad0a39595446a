"""`hs_block` against dense computations of the same pairs."""

import math

import pytest
import torch
from attention_models import batch, make
from transformers import DynamicCache, StaticCache

import hf_sparse
from hf_sparse.core.attention_settings import AttentionSettings
from hf_sparse.layers.attention import attend, interface
from hf_sparse.layers.attention.inputs import Inputs
from hf_sparse.layers.attention.masks import LazyMask
from hf_sparse.layers.attention.selectors import SELECTORS

SMALL = {"method": "hs_block", "block": 8, "key_block": 4, "keys": 16, "from_length": 0}
DECODERS = ("llama", "qwen3", "mistral", "opt")
FAMILIES = (*DECODERS, "bert", "modernbert", "vit")
CASES = [
    (family, kind)
    for family in FAMILIES
    for kind in ("plain", "left", "right", "packed")
    if kind == "plain" or (family != "vit" and (kind != "packed" or family in DECODERS[:3]))
]


@torch.no_grad()
def hidden(model, inputs):
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.fixture
def calls(monkeypatch):
    """Inputs, selection and result of each sparse attention."""
    found, attend = [], interface.attend

    def recorded(inputs, selection, residual, dropout=0.0):
        out = attend(inputs, selection, residual, dropout)
        found.append((inputs, selection, out))
        return out

    monkeypatch.setattr(interface, "attend", recorded)
    return found


def dense_mask(inputs):
    """(streams, queries, keys), as transformers makes it for SDPA."""
    mask = inputs.mask
    mask._options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask.__dict__.pop("dense", None)
    dense = mask.dense.expand(mask.batch_size, 1, -1, -1)[:, 0]
    return dense.repeat_interleave(inputs.streams // mask.batch_size, dim=0)


def reference(inputs, selection, with_centroids=True):
    """Attention over the selected pairs and the means of the other blocks, by full matrices."""
    allowed, step, size = dense_mask(inputs), inputs.step, inputs.size
    streams, queries, keys = allowed.shape
    query_block, key_block = torch.arange(queries) // step, torch.arange(keys) // size
    results = []
    for s in range(streams):
        real, k, v = allowed[s].any(dim=0), inputs.keys[s, :keys], inputs.values[s, :keys]
        in_block = key_block == torch.arange(math.ceil(keys / size))[:, None]
        of_block = (in_block & real).float()
        counts = of_block.sum(dim=1, keepdim=True)
        chosen = torch.zeros(query_block[-1] + 1, len(of_block), dtype=torch.bool)
        for i, blocks in enumerate(selection.blocks[s].tolist()):
            listed = [j for j in blocks if j >= 0]
            assert len(listed) == len(set(listed))
            chosen[i, listed] = True
        pairs = allowed[s] & chosen[query_block][:, key_block]
        hidden = allowed[s] & ~chosen[query_block][:, key_block]
        means = hidden.float() @ of_block.T > 0
        alive = allowed[s].any(dim=1)
        for t in alive.nonzero()[:, 0]:
            same = alive & (query_block == query_block[t])
            means[t] = means[same].any(dim=0)
            for j in means[t].nonzero()[:, 0]:
                whole = allowed[s][same][:, of_block[j] > 0]
                assert whole.all(), "a block that is seen in part is left out"
        all_keys = torch.cat([k, of_block @ k / counts.clamp(min=1)])
        all_values = torch.cat([v, of_block @ v / counts.clamp(min=1)])
        bias = torch.cat([torch.zeros(keys), counts[:, 0].log()])
        mask = torch.cat([pairs, means & with_centroids], dim=1)
        mask = mask.repeat_interleave(inputs.groups, dim=0)
        scores = (inputs.queries[s] @ all_keys.T + bias).masked_fill(~mask, -math.inf)
        results.append(scores.softmax(dim=1).nan_to_num() @ all_values)
    return torch.stack(results)


@pytest.mark.parametrize(
    ("family", "kind", "residual"),
    [(*case, "centroids") for case in CASES] + [("llama", "left", "nothing")],
)
def test_it_equals_a_dense_computation_of_the_same_pairs(calls, family, kind, residual):
    model, (inputs, _) = make(family), batch(kind, family)
    hf_sparse.use_attention(model, SMALL | {"residual": residual})
    assert not hidden(model, inputs).isnan().any()
    assert len(calls) == 2
    for call, selection, out in calls:
        expected = reference(call, selection, residual == "centroids")
        assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "settings"),
    [
        ("llama", "left", {"key_block": 3}),
        ("llama", "packed", {"residual": "centroids"}),
        ("mistral", "right", {"block": 40, "key_block": 16}),  # rows of more than one program
    ],
)
def test_the_triton_kernel_has_the_same_pairs(calls, monkeypatch, family, kind, settings):
    pytest.importorskip("triton")
    monkeypatch.setattr(attend, "runs_triton", lambda inputs, dropout: True)
    model, (inputs, _) = make(family), batch(kind, family)
    hf_sparse.use_attention(model, SMALL | settings)
    assert not hidden(model, inputs).isnan().any()
    for call, selection, out in calls:
        expected = reference(call, selection, "residual" in settings)
        assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [(24, 24), (5, 40)])
def test_the_triton_kernel_takes_any_number_of_channels(channels):
    triton_blocks = pytest.importorskip("hf_sparse.layers.attention.triton_blocks")
    torch.manual_seed(0)
    key_channels, value_channels = channels
    query, key = torch.randn(2, 4, 50, key_channels), torch.randn(2, 2, 50, key_channels)
    value = torch.randn(2, 2, 50, value_channels)
    settings = AttentionSettings(**SMALL)
    mask = LazyMask.plain(query, key, True)
    inputs = Inputs.of(query, key, value, mask, 0.3, settings)
    blocks = SELECTORS["block"]().select(inputs, settings, {}).blocks
    expected, found = attend.block_part(inputs, blocks), triton_blocks.block_part(inputs, blocks)
    assert torch.allclose(found.mean(), expected.mean(), atol=1e-5)
    sums = [(part.weight.log() + part.shift) for part in (found, expected)]
    assert torch.allclose(*sums, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_with_as_many_keys_as_there_are_it_is_exact(calls, family, kind):
    model, (inputs, real) = make(family), batch(kind, family)
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL | {"keys": 4096})
    found = hidden(model, inputs)
    assert calls
    assert torch.allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), [("llama", "packed"), ("mistral", "plain")])
def test_a_query_that_sees_the_middle_of_a_large_key_block_alone_sees_no_more(calls, family, kind):
    model, (inputs, real) = make(family), batch(kind, family)
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL | {"block": 2, "key_block": 16, "keys": 4096})
    found = hidden(model, inputs)
    assert calls
    assert torch.allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_has_exact_attention(calls):
    model = make("llama")
    hf_sparse.use_attention(model, SMALL)
    query = torch.randn(1, 4, 40, 8)
    module = model.model.layers[0].self_attn
    traced = torch.jit.trace(
        lambda q: interface.attention(module, q, q, q, None, method="hs_block")[0],
        query, check_trace=False,
    )  # fmt: skip
    assert not calls
    other = torch.randn(1, 4, 40, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(other, other, other, is_causal=True)
    assert torch.allclose(traced(other), exact.transpose(1, 2), atol=1e-5)


def test_another_method_that_transformers_is_told_of_has_its_own_settings(calls):
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    hf_sparse.use_attention(model, SMALL)
    model.set_attn_implementation("hs_smyrf")
    hidden(model, inputs)
    assert not calls  # exact below its own from_length


def test_few_keys_change_the_result():
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL)
    assert not torch.allclose(hidden(model, inputs), expected, atol=1e-3)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_exact_after_the_prompt(calls, family):
    model, (inputs, _) = make(family), batch("left", family)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    hf_sparse.use_attention(model, SMALL | {"keys": 4096})
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(calls) == 2  # the prompt's


@pytest.mark.parametrize("length", [40, 13])
def test_a_prompt_may_go_on_in_pieces(calls, length):
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    ids = inputs["input_ids"]
    hf_sparse.use_attention(model, SMALL | {"keys": 4096})
    expected = hidden(model, inputs)
    with torch.no_grad():
        cache = DynamicCache()
        model(ids[:, :length], None, None, cache)
        second = model(ids[:, length:], None, None, cache)
    assert torch.allclose(second.logits, expected[:, length:], atol=1e-5)
    assert len(calls) == 6


def test_a_few_tokens_after_many_have_what_one_at_a_time_has(calls):
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = hidden(model, inputs)[:, 68:]
        cache = DynamicCache()
        model(ids[:, :68], None, None, cache)
        hf_sparse.use_attention(model, SMALL)
        found = model(ids[:, 68:], None, None, cache).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not calls


def test_a_static_cache_has_exact_attention():
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    options |= {"disable_compile": True}
    expected = model.generate(**inputs, **options)
    hf_sparse.use_attention(model, SMALL | {"keys": 4096})
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("static", [False, True])
def test_exact_attention_is_causal_where_the_mask_is_whatever_a_module_says(static):
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    ids = inputs["input_ids"]
    expected = hidden(model, inputs)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # as decoders have it that know no SDPA
    cache = StaticCache(model.config, 80) if static else None
    hf_sparse.use_attention(model, SMALL | {"from_length": 100})
    with torch.no_grad():
        found = model(ids, None, None, cache, use_cache=static).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_of_selected_pairs_are_those_of_the_same_pairs_in_a_dense_computation(calls):
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    hf_sparse.use_attention(model, SMALL)
    hidden(model, inputs)
    call, selection, _ = calls[0]
    held = [call.queries, call.keys, call.values]
    gradients = []
    for compute in (
        lambda: attend.block_part(call, selection.blocks).mean(),
        lambda: reference(call, selection, with_centroids=False),
    ):
        for tensor in held:
            tensor.grad = None
            tensor.requires_grad_()
        compute().square().sum().backward()
        gradients.append([tensor.grad for tensor in held])
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_its_result_can_be_viewed_in_any_shape():
    query, key = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    settings = hf_sparse.AttentionSettings(**SMALL)
    mask = interface.LazyMask.plain(query, key, causal=True)
    assert interface.sparse(query, key, key, mask, 1.0, settings, {}).is_contiguous()


def test_a_mask_of_the_user_s_own_is_followed_exactly(calls):
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    own = torch.ones(75, 75, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1).clone()
    own[..., 3:9] = False
    own[..., range(75), range(75)] = True
    inputs |= {"attention_mask": own}
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL)
    assert torch.allclose(hidden(model, inputs), expected, atol=1e-6)
    assert not calls


def test_short_inputs_have_exact_attention(calls):
    model, (inputs, _) = make("llama"), batch("left", "llama")
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL | {"from_length": 76})
    assert torch.equal(hidden(model, inputs), expected)
    assert not calls


def test_gradients_are_those_of_exact_attention_where_it_is_exact():
    model, (inputs, _) = make("llama"), batch("plain", "llama")

    def gradient():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    hf_sparse.use_attention(model, SMALL | {"keys": 4096})
    assert torch.allclose(gradient(), expected, atol=1e-6, rtol=1e-4)


def test_half_precision_comes_back_in_half_precision():
    model, (inputs, _) = make("llama").bfloat16(), batch("plain", "llama")
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL | {"keys": 4096})
    found = hidden(model, inputs)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.05)


@pytest.mark.slow
def test_a_compiled_model_has_exact_attention():
    model, (inputs, _) = make("llama"), batch("plain", "llama")
    expected = hidden(model, inputs)
    hf_sparse.use_attention(model, SMALL)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(hidden(compiled, inputs), expected, atol=1e-5)
