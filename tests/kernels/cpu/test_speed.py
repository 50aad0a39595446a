"""What is measured, what is made of it, and that it is remembered."""

import errno
import json
import os

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_sparse.kernels import timing
from hf_sparse.kernels.cpu import library, product, speed
from hf_sparse.kernels.cpu.integer import weight as integers
from hf_sparse.kernels.cpu.pack import narrow, pack_dense
from hf_sparse.kernels.timing import SWITCH

WAYS = {each.name: {*each.ways, "dense"} for each in product.CLASSES}
POINTS = 2 * len(WAYS)  # of a kind: a small and a large shape for each class


def packed(rows=20, columns=36, kept=0.4):
    """A weight with random zeros."""
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=random)
    return pack_dense(weight * (torch.rand(rows, columns, generator=random) < kept))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The points that were measured, with a cache of its own: a weight takes a microsecond."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")

    class Measured(list):
        factor = 1.0

        def __call__(self, kind, tokens, shape):
            self.append((kind, tokens.name, shape))
            if self.factor is None:
                return None
            seconds = 1e-6 * shape[0] * shape[1]
            return dict.fromkeys(tokens.ways, seconds * self.factor) | {"dense": seconds}

    found = Measured()
    monkeypatch.setattr(speed, "_measure", found)
    return found


def test_a_machine_is_measured_once_for_each_kind_of_weight_whatever_the_shapes(
    monkeypatch, tmp_path, measured
):
    for rows, columns in [(20, 36), (40, 36), (4096, 64)]:
        found = speed.estimate(packed(rows, columns), torch.float32)
        assert {name: set(times) for name, times in found.items()} == WAYS
    assert len(measured) == POINTS
    speed.estimate(packed(kept=0.9), torch.float32)
    speed.estimate(packed(), torch.bfloat16)
    assert len(measured) == 3 * POINTS
    content = json.loads((tmp_path / "hf_sparse" / "speed.json").read_text())
    assert len(content) == 3 * POINTS
    monkeypatch.setenv(SWITCH, "0")
    assert speed.estimate(packed(), torch.float32) == {}


def test_a_time_is_that_of_a_call_and_of_each_weight(measured):
    for rows, columns in [(16, 16), (300, 300), (4096, 4096)]:
        found = speed.estimate(packed(rows, columns), torch.float32)
        for times in found.values():
            for seconds in times.values():
                assert seconds == pytest.approx(1e-6 * rows * columns, rel=1e-3, abs=1e-4)
    sizes = [256 * 256, 2048 * 2048]
    assert speed._line(sizes, tuple(3 + size for size in sizes), 1000) == pytest.approx(1003)


@pytest.mark.parametrize("seconds", [(5.0, 4.0), (1.0, 1e9)])
def test_no_part_of_a_time_is_below_zero(seconds):
    sizes = [256 * 256, 2048 * 2048]
    for at in (1, 256 * 256, 1 << 30):
        assert speed._line(sizes, seconds, at) > 0
    assert speed._line(sizes, seconds, sizes[1]) == seconds[1]


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
    expected = speed.estimate(weight, torch.float32)
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif isinstance(damage, str):
        file.write_text(damage)
    else:
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), damage)))
    assert speed.estimate(weight, torch.float32) == expected
    assert len(measured) == 2 * POINTS
    assert all(json.loads(file.read_text()).values())
    measured.clear()
    assert speed.estimate(weight, torch.float32) == expected
    assert measured == []


@pytest.mark.parametrize("seconds", [1e-300, 1e300])
def test_times_that_no_clock_tells_are_measured_again(tmp_path, measured, seconds):
    weight, file = packed(), tmp_path / "hf_sparse" / "speed.json"
    expected = speed.estimate(weight, torch.float32)
    known = json.loads(file.read_text())
    absurd = {key: {**found, "packed": seconds} for key, found in known.items()}
    file.write_text(json.dumps(absurd))
    assert speed.estimate(weight, torch.float32) == expected
    assert json.loads(file.read_text()) == known


def test_a_full_disk_means_measuring_again_and_leaves_nothing_behind(
    monkeypatch, tmp_path, measured
):
    def full(content, file, **_):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(timing.json, "dump", full)
    assert speed.estimate(packed(), torch.float32).keys() == WAYS.keys()
    assert list((tmp_path / "hf_sparse").iterdir()) == []


def test_what_another_process_measures_meanwhile_is_kept(tmp_path, measured):
    def measure():
        timing.remembered("theirs", ["packed"], lambda: {"packed": 2.0})
        return {"packed": 1.0}

    timing.remembered("ours", ["packed"], measure)
    content = json.loads((tmp_path / "hf_sparse" / "speed.json").read_text())
    assert sorted(found["packed"] for found in content.values()) == [1.0, 2.0]


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
    assert speed.estimate(packed(), torch.float32).keys() == WAYS.keys()
    if place == "a folder":
        assert list(folder.iterdir()) == [file]


def test_what_can_not_be_measured_is_missing_and_tried_again(measured):
    measured.factor = None
    assert speed.estimate(packed(), torch.float32) == {}
    measured.factor = 1.0
    assert speed.estimate(packed(), torch.float32).keys() == WAYS.keys()


def test_absurd_times_are_refused(monkeypatch):
    kind = speed.Kind.of(packed(), torch.float32)
    for factor, sane in [(0.5, True), (1e-4, False), (1e4, False)]:
        times = {"packed": factor, "dense": 1.0}
        monkeypatch.setattr(speed, "compare", lambda candidates, times=times: times)
        assert (speed._measure(kind, product.CLASSES[0], (16, 16)) is not None) == sane


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, library.INT4])
@pytest.mark.parametrize("group", [0, 32])
def test_what_is_measured_is_of_the_weight_s_kind(dtype, group):
    codes = dtype in library.INTEGERS
    weight = packed(64, 64, 0.5)
    if codes:
        scales = torch.ones(64, 2 if group else 1)
        weight = pack_dense(torch.randint(0, 7, (64, 64), dtype=torch.int8), scales, group or 64)
        weight = narrow(weight) if dtype == library.INT4 else weight
    elif dtype == torch.bfloat16:
        weight = pack_dense(torch.eye(64, dtype=dtype))
    kind = speed.Kind.of(weight, torch.float32)
    sample = kind.sample((256, 64))
    assert sample.dtype == weight.dtype
    assert sample.shape == (256, 64)
    assert speed.Kind.of(sample, torch.float32) == kind


@pytest.mark.parametrize("top", [7, 127])
@pytest.mark.parametrize("each", [0, 2, 4, 8])
def test_what_is_measured_of_rounded_activations_is_of_the_weight_s_kind(top, each):
    codes = torch.full((64, 64), top, dtype=torch.int8)
    codes.view(64, 8, 8)[:, :, each or 4 :] = 0
    weight = integers.pack(codes, torch.ones(64, 2), 32, each)
    kind = speed.Kind.of(weight, torch.float32)
    sample = kind.sample((256, 64))
    assert (sample.shape, sample.bits, sample.kept) == ((256, 64), weight.bits, each)
    assert speed.Kind.of(sample, torch.float32) == kind
    ways = {tokens.ways for tokens in product.classes_of(weight)}
    assert ways == {("packed",)}
    assert kind != speed.Kind.of(pack_dense(codes, torch.ones(64, 2), 32), torch.float32)


def test_times_are_the_least_of_each_operand_and_a_busy_machine_s_are_refused(monkeypatch):
    clock, calls = [0.0], []

    def call(seconds):
        calls.append(seconds)
        disturbed = busy(len(calls))
        clock[0] += seconds * (10 if disturbed else 1)
        return torch.empty(0)

    monkeypatch.setattr(timing, "CLOCK", lambda: clock[0])
    candidates = {"packed": (call, [0.001, 0.003]), "dense": (call, [0.008])}
    busy = lambda n: n % 3 == 0 and n < 12  # noqa: E731
    assert timing.compare(candidates) == pytest.approx({"packed": 0.002, "dense": 0.008})
    calls.clear()
    busy = lambda n: (n - 1) // 3 % 2 == 1  # noqa: E731 - every second round
    assert timing.compare(candidates) is None
    assert clock[0] < 5


def test_modes_of_the_caller_are_no_part_of_a_time():
    class Watching(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen += 1
            return function(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Watching() as mode:
        mode.seen = 0
        timing.compare({"packed": (torch.sin, [x]), "dense": (torch.cos, [x])})
        assert mode.seen == 0
        torch.sin(x)
        assert mode.seen == 1


def test_measurements_are_positive_for_every_way(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(timing, "WIDE_SPREAD", 1e9)
    monkeypatch.setattr(speed, "ABSURD", 1e9)
    monkeypatch.setattr(speed, "COLD_BYTES", 1)
    kind = speed.Kind.of(packed(40), torch.float32)
    for each in product.CLASSES:
        found = speed._measure(kind, each, (32, 32))
        assert set(found) == WAYS[each.name]
        assert all(seconds > 0 for seconds in found.values())
