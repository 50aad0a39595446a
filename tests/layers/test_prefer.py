"""Packed or dense, as the user prefers, with the times made up."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.kernels.cpu import speed
from hf_sparse.layers import sparse_layers


@pytest.fixture
def times(monkeypatch):
    """Speed over dense by a layer's rows; a packed product takes a second a weight."""

    class Times(dict):
        def __call__(self, weight, dtype):
            seconds = weight.shape[0] * weight.shape[1]
            speedup = self.get(weight.shape[0], self.get("other"))
            return {"1": {"packed": seconds, "dense": seconds * speedup}} if speedup else {}

    found = Times(other=1.0)
    monkeypatch.setattr(speed, "estimate", found)
    return found


def kernels(model):
    return {layer.shape[0]: layer.kernel.name for layer in sparse_layers(model).values()}


def pruned(model, **settings):
    report = hf_sparse.prune(model, SparseConfig(method="magnitude", **settings))
    assert {x.name: (x.kernel, x.bytes_resident) for x in report.layers} == {
        name: (layer.kernel.name, layer.resident_bytes())
        for name, layer in sparse_layers(model).items()
    }
    return report


def test_auto_decides_for_the_whole_model(tiny, times):
    times[40] = 0.5  # slower by itself, but not all together
    times["other"] = 4.0
    pruned(tiny)
    assert kernels(tiny) == {24: "tile", 12: "tile", 40: "tile"}
    times["other"] = 0.8
    pruned_anew = AutoModelForCausalLM.from_config(tiny.config)
    report = pruned(pruned_anew)
    assert kernels(pruned_anew) == {24: "dense", 12: "dense", 40: "dense"}
    assert 'on disk only; prefer="memory" packs' in report.summary()
    explanation = hf_sparse.explain(pruned_anew)
    assert "14 are dense in memory (the saving is on disk only)" in str(explanation)
    assert "prefer='auto': 0." in explanation.verbose()


def test_memory_is_always_packed_and_speed_takes_what_is_faster_layer_by_layer(tiny, times):
    times |= {40: 0.5, "other": 0.9}
    pruned(tiny, prefer="memory")
    assert kernels(tiny) == {24: "tile", 12: "tile", 40: "tile"}
    hf_sparse.prefer(tiny, "speed")
    assert kernels(tiny) == {24: "dense", 12: "dense", 40: "dense"}
    times |= {24: 1.1, 12: 1.1}
    other = AutoModelForCausalLM.from_config(tiny.config)
    pruned(other, prefer="speed")
    assert kernels(other) == {24: "tile", 12: "tile", 40: "dense"}


@pytest.mark.parametrize(("speedup", "kernel"), [(0.95, "tile"), (0.85, "dense")])
def test_a_little_slower_is_worth_the_memory(tiny, times, speedup, kernel):
    times["other"] = speedup
    pruned(tiny)
    assert set(kernels(tiny).values()) == {kernel}


def test_layers_that_round_their_inputs_are_candidates_with_cost_and_speed(tiny, times):
    times["other"] = 2.0
    pruned(tiny, bits=8, activations="int8")
    assert set(kernels(tiny).values()) == {"integer"}
    explanation = hf_sparse.explain(tiny)
    assert {layer.speedup for layer in explanation.layers} == {2.0}
    assert all("for 1 packed 2.00" in layer.why for layer in explanation.layers)
    times["other"] = 0.5
    hf_sparse.round_activations(tiny, None)
    hf_sparse.round_activations(tiny, "int8")
    assert set(kernels(tiny).values()) == {"dense"}
    hf_sparse.prefer(tiny, "memory")
    assert set(kernels(tiny).values()) == {"integer"}


def test_a_loaded_model_can_be_changed_and_computes_the_same(tiny, times):
    times["other"] = 0.5
    pruned(tiny)
    x = torch.arange(6)[None]
    before = {name: layer.packed for name, layer in sparse_layers(tiny).items()}
    with torch.no_grad():
        dense = tiny(x).logits
        hf_sparse.prefer(tiny, "memory")
        assert set(kernels(tiny).values()) == {"tile"}
        torch.testing.assert_close(tiny(x).logits, dense)
    assert tiny.hf_quantizer.quantization_config.prefer == "memory"
    for name, layer in sparse_layers(tiny).items():
        assert all(torch.equal(before[name][key], t) for key, t in layer.packed.items())
    hf_sparse.prefer(tiny, "auto")
    assert set(kernels(tiny).values()) == {"dense"}


def test_a_decision_survives_casts_and_loading(tiny, times, tmp_path):
    times["other"] = 0.5
    pruned(tiny)
    assert set(kernels(tiny.to(torch.bfloat16)).values()) == {"dense"}
    tiny.load_state_dict(tiny.state_dict())
    assert set(kernels(tiny).values()) == {"dense"}


def test_from_pretrained_takes_it_for_a_sparse_checkpoint(tiny, times, tmp_path):
    times["other"] = 0.5
    pruned(tiny)
    tiny.save_pretrained(tmp_path)
    assert set(kernels(AutoModelForCausalLM.from_pretrained(tmp_path)).values()) == {"dense"}
    with pytest.warns(UserWarning, match="loading attributes .*prefer"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=SparseConfig(method="magnitude", prefer="memory")
        )
    assert set(kernels(model).values()) == {"tile"}
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert set(kernels(again).values()) == {"tile"}


def test_without_measurements_layers_are_packed(tiny, times):
    times["other"] = None
    pruned(tiny)
    assert set(kernels(tiny).values()) == {"tile"}
    hf_sparse.prefer(tiny, "speed")
    assert set(kernels(tiny).values()) == {"tile"}


def test_what_is_no_preference_is_named(tiny):
    with pytest.raises(hf_sparse.ConfigError, match="prefer='fast' does not exist: pass 'auto'"):
        SparseConfig(prefer="fast")
    with pytest.raises(hf_sparse.ConfigError, match="prefer='fast' does not exist: pass 'auto'"):
        hf_sparse.prefer(tiny, "fast")


def test_explain_leads_with_what_the_sparse_layers_cost_and_gain(monkeypatch, tiny, times):
    times["other"] = 2.0
    pruned(tiny)
    dense = {torch.float32: 4.0, torch.bfloat16: 3.0}  # seconds a weight, packed ones take 1
    monkeypatch.setattr(speed, "dense_token", lambda shape, dtype: dense[dtype] * math.prod(shape))
    explanation = hf_sparse.explain(tiny)
    assert explanation.speedup == pytest.approx({"float32": 4.0, "bfloat16": 3.0})
    weights = sum(math.prod(layer.shape) for layer in explanation.layers)
    text = str(explanation).splitlines()
    assert text[1].startswith("14 sparse layers (14 tile), ")
    share = explanation.bytes_resident / weights
    assert text[2].startswith(f"over dense float32: {share / 4:.3f} of the bytes; a token's")
    assert text[3].endswith(f"{share / 2:.3f} of the bytes; a token's products 3.00 times as fast")
    assert len(text) == 5 + 7  # and a line for each of a block's layers
    monkeypatch.setattr(speed, "dense_token", lambda shape, dtype: None)
    assert hf_sparse.explain(tiny).speedup == {}
    assert hf_sparse.explain(tiny.lm_head).verdict == "no sparse layers"
