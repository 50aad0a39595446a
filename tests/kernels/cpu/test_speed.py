"""What is measured, and that it is remembered."""

import json

import torch

from hf_sparse.kernels.cpu import product, speed
from hf_sparse.kernels.cpu.tile_weight import pack_dense
from hf_sparse.kernels.timing import SWITCH


def packed(rows=20):
    """A weight of 60 % zeros."""
    weight = torch.randn(rows, 36, generator=torch.Generator().manual_seed(rows))
    return pack_dense(weight * (torch.arange(rows * 36).view(rows, 36) % 5 < 2))


def speeds_of(monkeypatch, tmp_path, answer):
    """`speed.over_dense` with a cache of its own, and the classes that it measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")
    measured = []
    monkeypatch.setattr(
        speed, "_measure", lambda weight, dtype, tokens: measured.append(tokens.name) or answer
    )
    return measured


def test_measurements_are_kept_per_machine_shape_and_sparsity(monkeypatch, tmp_path):
    measured = speeds_of(monkeypatch, tmp_path, {"packed": 1.5})
    weight = packed()
    names = [each.name for each in product.CLASSES]
    for _ in range(3):
        assert speed.over_dense(weight, torch.float32) == {n: {"packed": 1.5} for n in names}
    assert measured == names
    speed.over_dense(packed(24), torch.float32)
    speed.over_dense(weight, torch.bfloat16)
    assert measured == 3 * names
    file = tmp_path / "hf_sparse" / "speed.json"
    content = json.loads(file.read_text())
    assert len(content) == 3 * len(names)
    assert all("20x36" in key or "24x36" in key for key in content)
    key = next(iter(content))
    for damaged in ("{damaged", "[]", json.dumps({key: 1.5}), json.dumps({key: {"packed": "x"}})):
        file.write_text(damaged)
        assert speed.over_dense(weight, torch.float32)["1"] == {"packed": 1.5}
    monkeypatch.setenv(SWITCH, "0")
    assert speed.over_dense(weight, torch.float32) == {}


def test_what_is_slower_at_one_token_is_not_measured_further(monkeypatch, tmp_path):
    measured = speeds_of(monkeypatch, tmp_path, {"packed": 0.9})
    found = speed.over_dense(packed(), torch.float32)
    assert measured == list(found) == ["1"]


def test_measurements_are_positive_ratios_for_every_way(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(speed, "WARM_WEIGHTS", 1)  # so that the first tile stands for all
    weight = packed(40)
    for each in product.CLASSES:
        found = speed._measure(weight, torch.float32, each)
        assert tuple(found) == each.ways
        assert all(ratio > 0 for ratio in found.values())
