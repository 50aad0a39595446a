"""Packed or dense, as the user prefers, with the times made up."""

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
    assert "prefer='auto': 0." in str(hf_sparse.explain(pruned_anew))


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
