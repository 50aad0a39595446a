"""What is measured, and that it is remembered."""

import json
import os

import pytest
import torch

from hf_sparse.kernels import timing
from hf_sparse.kernels.cpu import product, speed
from hf_sparse.kernels.cpu.pack import pack_dense
from hf_sparse.kernels.timing import SWITCH


def packed(rows=20):
    """A weight of 60 % zeros."""
    weight = torch.randn(rows, 36, generator=torch.Generator().manual_seed(rows))
    return pack_dense(weight * (torch.arange(rows * 36).view(rows, 36) % 5 < 2))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The classes that `speed.over_dense` measured, with a cache of its own; all take `speed`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")

    class Measured(list):
        speed = 1.5

        def __call__(self, weight, dtype, tokens):
            self.append(tokens.name)
            return dict.fromkeys(tokens.ways, self.speed)

    found = Measured()
    monkeypatch.setattr(speed, "_measure", found)
    return found


NAMES = [each.name for each in product.CLASSES]
ALL = {each.name: dict.fromkeys(each.ways, 1.5) for each in product.CLASSES}


def test_measurements_are_kept_per_machine_shape_and_sparsity(monkeypatch, tmp_path, measured):
    weight = packed()
    for _ in range(3):
        assert speed.over_dense(weight, torch.float32) == ALL
    assert measured == NAMES
    speed.over_dense(packed(24), torch.float32)
    speed.over_dense(weight, torch.bfloat16)
    assert measured == 3 * NAMES
    content = json.loads((tmp_path / "hf_sparse" / "speed.json").read_text())
    assert len(content) == 3 * len(NAMES)
    assert all("20x36" in key or "24x36" in key for key in content)
    monkeypatch.setenv(SWITCH, "0")
    assert speed.over_dense(weight, torch.float32) == {}


@pytest.mark.parametrize(
    "damage",
    [
        "{damaged",
        "[]",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        1.5,
        {},
        {"other": 5.0},
        {"packed": "x"},
        {"packed": True},
        {"packed": -1.0},
        {"packed": [2.0]},
        {"packed": 10**400},
        {"packed": float("inf")},
        {"packed": float("nan")},
        {"packed": 2.0, "decoded": 10**400},
        b"\xff\xfe",
    ],
    ids=lambda damage: str(damage)[:20],
)
def test_a_damaged_cache_means_measuring_again(tmp_path, measured, damage):
    weight, file = packed(), tmp_path / "hf_sparse" / "speed.json"
    speed.over_dense(weight, torch.float32)
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif isinstance(damage, str):
        file.write_text(damage)
    else:
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), damage)))
    assert speed.over_dense(weight, torch.float32) == ALL
    assert len(measured) > len(NAMES)
    assert all(json.loads(file.read_text()).values())
    measured.clear()
    assert speed.over_dense(weight, torch.float32) == ALL
    assert measured == []


@pytest.mark.parametrize("place", ["a folder", "a pipe", "a huge file", "a file above it"])
def test_what_is_no_cache_file_is_never_waited_for(tmp_path, measured, place):
    folder = tmp_path / "hf_sparse"
    file = folder / "speed.json"
    if place == "a file above it":
        folder.write_text("")
    else:
        folder.mkdir()
    if place == "a folder":
        file.mkdir()
    elif place == "a pipe":
        os.mkfifo(file)
    elif place == "a huge file":
        with file.open("wb") as huge:
            huge.truncate(timing.MOST_BYTES + 1)
    assert speed.over_dense(packed(), torch.float32) == ALL
    if place == "a folder":
        assert list(folder.iterdir()) == [file]


def test_what_is_slower_at_one_token_is_not_measured_further(measured):
    measured.speed = 0.9
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
