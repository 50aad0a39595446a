"""Every selector with every residual: which pairs it has, against sums over full matrices."""

import math

import pytest
import torch
from attention_models import batch, make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import AttentionSettings, CheckpointError, ConfigError, SparseConfig
from hf_sparse.core.attention_settings import METHODS
from hf_sparse.layers.attention.attend import attend
from hf_sparse.layers.attention.inputs import Inputs
from hf_sparse.layers.attention.interface import states
from hf_sparse.layers.attention.masks import LazyMask
from hf_sparse.layers.attention.residuals import RESIDUALS
from hf_sparse.layers.attention.selectors import SELECTORS

LEARNING = ("hs_routing", "hs_mongoose")
IDS = [torch.randint(3, 50, (64,), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def call(causal=True, length=61):
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, heads, length, 8) for heads in (4, 2, 2))
    mask = LazyMask.plain(query, key, causal)
    return Inputs.of(query, key, value, mask, 1.0, settings())


def settings(**changes):
    return AttentionSettings(
        **({"keys": 32, "block": 8, "key_block": 4, "from_length": 0} | changes)
    )


def select(name, inputs, given):
    selector = SELECTORS[name]()
    samples = inputs.queries[:2, ::2], inputs.keys[:2, :61]
    learned = selector.learn(*samples, given) if selector.learns else {}
    return selector.select(inputs, given, learned)


def selected(inputs, selection, stream):
    """(rows, keys): True where a pair is among the selected ones."""
    keys, step, size = inputs.mask.kv_length, inputs.step, inputs.size
    rows = inputs.queries.shape[1]
    query = torch.arange(rows) // inputs.groups
    found = torch.zeros(rows, keys, dtype=torch.bool)
    for i, blocks in enumerate(selection.blocks[stream].tolist()):
        for j in (j for j in blocks if j >= 0):
            found[query // step == i, j * size : (j + 1) * size] = True
    whole = inputs.whole[stream][query // step][:, torch.arange(keys) // size]
    if selection.clusters is not None:
        for c in range(selection.clusters.rows.shape[1]):
            those = selection.clusters.keys[stream, c]
            rows = selection.clusters.rows[stream, c][:, None]
            found[rows, those[those < keys]] |= whole[rows, those[those < keys]]
    query, key = query[:, None], torch.arange(keys)
    allowed = inputs.mask.allowed(torch.tensor(0), query, key)
    return found & allowed, allowed & whole


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("residual", list(RESIDUALS))
@pytest.mark.parametrize("selector", list(SELECTORS))
def test_selected_pairs_are_exact_and_others_are_the_residual_s(selector, residual, causal):
    inputs, given = call(causal), settings(selector=selector, residual=residual)
    selection = select(selector, inputs, given)
    estimates = RESIDUALS[residual](inputs, given)
    out = attend(inputs, selection, estimates)
    rows = torch.arange(inputs.queries.shape[1]).expand(inputs.streams, -1)
    keys = torch.arange(61).expand(inputs.streams, -1)
    others = estimates.scores(rows, keys)
    for stream in range(inputs.streams):
        exact, whole = selected(inputs, selection, stream)
        scores = inputs.queries[stream] @ inputs.keys[stream, :61].T
        scores = scores.masked_fill(~exact, -math.inf)
        if others is not None:
            rest = whole & ~exact
            scores = torch.where(rest, others[stream], scores)
        expected = scores.softmax(dim=-1) @ inputs.values[stream, :61]
        assert torch.allclose(out[stream], expected, atol=1e-4)


def test_random_features_come_near_to_the_exponential():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16, 8) / 4, torch.randn(1, 1, 16, 8) / 4
    inputs = Inputs.of(query, key, key, LazyMask.plain(query, key, False), 1.0, settings())
    index = torch.arange(16)[None]
    found = RESIDUALS["favor"](inputs, settings(features=20000)).scores(index, index)
    error = found.exp()[0] / (query @ key.mT).exp()[0, 0] - 1
    assert error.abs().max() < 0.1


def test_routing_finds_groups_that_are_there():
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(1, 4, 8), dim=-1)
    groups = torch.arange(400) % 4
    vectors = centres[:, groups] + 0.02 * torch.randn(1, 400, 8)
    learned = SELECTORS["routing"]().learn(vectors, vectors, settings())["centres"]
    assert (learned @ centres.mT).amax(dim=1).min() > 0.99


def test_mongoose_s_directions_bring_queries_to_their_keys():
    torch.manual_seed(0)
    keys = torch.randn(1, 256, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    queries = keys + 0.1 * torch.randn_like(keys) + (keys @ rotation) * 0.3

    def distance(directions):
        query, key = (torch.nn.functional.normalize(x, dim=-1) @ directions.mT
                      for x in (queries, keys))  # fmt: skip
        best = (queries @ keys.mT).argmax(dim=-1)[0]
        near = (query - key[:, best]).norm(dim=-1).mean()
        return near / (query - key[:, torch.randperm(256)]).norm(dim=-1).mean()

    learned = SELECTORS["mongoose"]().learn(queries, keys, settings())["centres"]
    random = torch.nn.functional.normalize(torch.randn(1, 64, 16), dim=-1)
    assert distance(learned) < distance(random)


@torch.no_grad()
def logits(model, kind="left"):
    return model(**batch(kind, "llama")[0]).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_padded_batches(method):
    model = make("llama")
    exact = logits(model)
    given = {"method": method, "block": 8, "key_block": 4, "keys": 32, "from_length": 0}
    hf_sparse.use_attention(model, given, IDS if method in LEARNING else None)
    found = logits(model)
    assert found.isfinite().all()
    assert not torch.allclose(found, exact, atol=1e-3)


@pytest.mark.parametrize("method", ["hs_smyrf", *LEARNING])
def test_with_as_many_keys_as_there_are_clusters_are_exact(method):
    model = make("llama")
    exact, real = logits(model), batch("left", "llama")[1]
    given = {"method": method, "block": 8, "key_block": 4, "keys": 4096, "from_length": 0}
    hf_sparse.use_attention(model, given, IDS if method in LEARNING else None)
    assert torch.allclose(logits(model)[real], exact[real], atol=1e-4)


def test_a_sample_may_begin_with_blocks_of_padding():
    model = make("llama")
    inputs = {name: value[:1] for name, value in batch("left", "llama")[0].items()}
    with torch.no_grad():
        exact = model(**inputs).logits
        hf_sparse.use_attention(model, {"block": 8, "key_block": 4, "keys": 4096, "from_length": 0})
        assert torch.allclose(model(**inputs).logits[:, 29:], exact[:, 29:], atol=1e-5)


@pytest.mark.parametrize("method", LEARNING)
def test_what_was_learned_is_saved_beside_the_weights(tmp_path, method):
    model = make("llama")
    given = {"method": method, "block": 8, "key_block": 4, "keys": 32, "from_length": 0}
    hf_sparse.prune(
        model, SparseConfig(method="magnitude", sparsity=0.5, attention=given, dataset=IDS,
                            num_samples=2, seq_len=64)
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    learned = load_file(tmp_path / "sparse_attention.safetensors")
    assert set(learned) == {f"model.layers.{i}.self_attn.centres" for i in range(2)}
    assert not any("sparse_attention" in key for key in load_file(tmp_path / "model.safetensors"))
    metadata = {"selector": METHODS[method][0]}
    for damage, message in (
        ({"model.layers.0.self_attn.centres": torch.ones(2, 3, 9)}, r"shape \(2, 3, 9\)"),
        ({"model.layers.0.self_attn.centres": torch.full((2, 3, 8), math.nan)}, "no finite"),
        ({"other": torch.ones(2)}, "model.layers.0.self_attn.centres is missing"),
    ):
        save_file(damage, tmp_path / "sparse_attention.safetensors", metadata)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(learned, tmp_path / "sparse_attention.safetensors", {"selector": "other"})
    with pytest.raises(CheckpointError, match="selector 'other' has learned, not"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "sparse_attention.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    hf_sparse.use_attention(model, None)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "sparse_attention.safetensors").exists()
    assert states(model) == {}


@pytest.mark.parametrize("lowest", ["cpu", "disk"])
def test_what_an_offloaded_model_has_learned_is_in_memory(tmp_path, lowest):
    model = make("llama")
    given = {"method": "hs_routing", "block": 8, "key_block": 4, "keys": 32, "from_length": 0}
    hf_sparse.prune(
        model, SparseConfig(method="magnitude", sparsity=0.5, attention=given, dataset=IDS,
                            num_samples=2, seq_len=64)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "saved")
    names = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")
    places = {f"model.{name}": "disk" if "." in name else lowest for name in names}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places | {"lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )  # fmt: skip
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", LEARNING)
def test_a_method_that_learns_needs_data(method):
    model = make("llama")
    with pytest.raises(ConfigError, match="needs calibration data"):
        hf_sparse.use_attention(model, method)
    model.set_attn_implementation(method)
    with pytest.raises(ConfigError, match="learns from data"):
        model(torch.zeros(1, 9000, dtype=torch.long))
