"""What `explain` says of a model's attention."""

import re

from attention_models import make

import hf_sparse
from hf_sparse.layers.attention import speed

SETTINGS = {"keys": 16, "block": 8, "key_block": 4}


def test_explain_says_from_which_length_attention_pays(monkeypatch):
    model = make("llama")
    assert hf_sparse.explain(model).attention is None
    hf_sparse.use_attention(model, SETTINGS)
    times = {"1024": 0.5, "2048": 0.9, "4096": 1.25, "8192": 2.5}
    monkeypatch.setattr(speed, "measured", lambda state: times)
    explanation = hf_sparse.explain(model)
    assert "here faster than exact from 4096 on" in explanation.attention
    assert "1.25 at 4096" in str(explanation)
    monkeypatch.setattr(speed, "measured", lambda state: dict.fromkeys(times, 0.5))
    assert "not faster by 8192" in str(hf_sparse.explain(model))


def test_what_was_measured_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(speed.timing, "cache_file", lambda: tmp_path / "speed.json")
    monkeypatch.setattr(speed.timing, "enabled", lambda: True)
    monkeypatch.setattr(speed, "LENGTHS", (32, 64))
    monkeypatch.setattr(speed.timing, "WIDE_SPREAD", 1e9)
    monkeypatch.setattr(speed.timing, "SPREAD", 1e9)
    model = make("llama")
    hf_sparse.use_attention(model, SETTINGS)
    (line,) = re.findall(r"speed over exact: .* at 32, .* at 64", str(hf_sparse.explain(model)))
    monkeypatch.setattr(speed, "_measure", lambda *arguments: None)
    assert line in str(hf_sparse.explain(model))


def test_nothing_is_measured_where_that_is_switched_off(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_MEASURE", "0")
    model = make("llama")
    hf_sparse.use_attention(model, SETTINGS)
    assert hf_sparse.explain(model).attention.endswith("not measured here")
