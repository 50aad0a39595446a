"""The choice between sparse and dense on a GPU, with the times and the memory made up."""

import pytest
import torch

from hf_sparse.formats import Bitmask
from hf_sparse.formats.n_of_m import NMPacked
from hf_sparse.kernels import KERNELS, Stored, choose
from hf_sparse.kernels.dense import DenseKernel
from hf_sparse.kernels.gpu import kernel, product, semi_structured, timing

GB = 1 << 30


@pytest.fixture
def stored():
    weight = torch.randn(40, 64)
    weight[:, ::2] = 0
    return Stored(Bitmask(), Bitmask().pack(weight), (40, 64), torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose sparse products take `seconds`, dense ones 1; tensors stay where they are."""
    monkeypatch.setenv("HF_SPARSE_MEASURE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "gpu", lambda: "NVIDIA Made Up")
    monkeypatch.setattr(kernel.SlicedKernel, "obstacle", staticmethod(lambda stored: None))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 24 * GB))
    timed = []

    def seconds(*alternatives):
        timed.extend(map(len, alternatives))
        assert alternatives[0][0].func is torch.nn.functional.linear
        return [1.0, *(seconds.sparse for _ in alternatives[1:])]

    seconds.sparse, seconds.timed = 0.5, timed
    monkeypatch.setattr(timing, "graph_seconds", seconds)
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    return seconds


def test_what_is_faster_is_taken_and_says_how_much(gpu, stored):
    considered = kernel.SlicedKernel.consider(stored)
    assert considered.kernel is not None
    assert considered.verdict.speedup == 2
    assert [way.tokens for way in considered.verdict.ways] == [c.name for c in product.CLASSES]
    assert "2.00" in considered.verdict.reason


def test_times_are_taken_once_for_a_shape_and_a_gpu(gpu, stored, monkeypatch):
    kernel.SlicedKernel.consider(stored)
    known = len(gpu.timed)
    assert known > 0
    kernel.SlicedKernel.consider(stored)
    assert len(gpu.timed) == known
    monkeypatch.setattr(timing, "gpu", lambda: "NVIDIA Another")
    kernel.SlicedKernel.consider(stored)
    assert len(gpu.timed) == 2 * known


def test_weights_are_timed_cold_on_copies_of_their_own(gpu, stored):
    kernel.SlicedKernel.consider(stored)
    assert set(gpu.timed) == {3}


def test_what_is_slower_gives_way_to_dense_if_there_is_room(gpu, stored):
    gpu.sparse = 2.0
    considered = kernel.SlicedKernel.consider(stored)
    assert considered.kernel is None
    assert considered.verdict.speedup == 0.5


def test_without_room_it_stays_packed_and_says_what_dense_would_cost(gpu, stored, monkeypatch):
    gpu.sparse = 2.0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 24 * GB))
    considered = kernel.SlicedKernel.consider(stored)
    assert considered.kernel is not None
    assert "stays packed" in considered.verdict.reason
    assert "5120 of 24576 MB" in considered.verdict.reason


def test_memory_that_torch_holds_and_uses_no_more_is_room(gpu, stored, monkeypatch):
    gpu.sparse = 2.0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GB)
    assert kernel.SlicedKernel.consider(stored).kernel is None


def test_without_room_to_measure_it_stays_packed(gpu, stored, monkeypatch):
    def full(*alternatives):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "graph_seconds", full)
    considered = kernel.SlicedKernel.consider(stored)
    assert considered.kernel is not None
    assert considered.verdict.reason == "not measured"


def test_nothing_is_timed_where_that_is_switched_off(gpu, stored, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_MEASURE", "0")
    considered = kernel.SlicedKernel.consider(stored)
    assert considered.kernel is not None
    assert considered.verdict.speedup is None
    assert gpu.timed == []


@pytest.mark.parametrize(("seconds", "taken"), [(0.9, True), (1.1, False)])
def test_2_4_is_taken_only_where_it_is_not_slower(gpu, monkeypatch, seconds, taken):
    class Weight:
        def __init__(self, dense):
            self.own = dense

        of = classmethod(lambda cls, dense: cls(dense))
        nbytes = 1000

        def copy(self):
            return self

        def __call__(self, x):
            return x @ self.own.T

        values = meta = property(lambda self: self.own)
        shape = (32, 64)

    weight = torch.randn(32, 64).bfloat16().view(32, 16, 4)
    weight[:, :, :2] = 0
    fmt = NMPacked(2, 4)
    packed = fmt.pack(weight.view(32, 64))
    monkeypatch.setattr(
        semi_structured.SemiStructuredKernel, "obstacle", staticmethod(lambda stored: None)
    )
    monkeypatch.setattr(semi_structured, "SemiStructuredWeight", Weight)
    gpu.sparse = seconds
    considered = semi_structured.SemiStructuredKernel.consider(
        Stored(fmt, packed, (32, 64), torch.bfloat16)
    )
    assert (considered.kernel is not None) == taken
    assert considered.verdict.speedup == pytest.approx(1 / seconds, rel=1e-3)


@pytest.mark.parametrize(("rows", "taken"), [(65535 * 32, True), (65535 * 32 + 1, False)])
def test_rows_are_as_many_as_a_grid_has_places_for(monkeypatch, rows, taken):
    fmt = Bitmask()
    tensors = fmt.pack(torch.ones(1, 1))
    monkeypatch.setattr(Stored, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernel.triton_works, "obstacle", lambda device: None)
    obstacle = kernel.SlicedKernel.obstacle(Stored(fmt, tensors, (rows, 1), torch.float32))
    assert obstacle is None if taken else "2097120 rows" in obstacle


def test_on_a_cpu_the_kernels_of_gpus_stand_back_and_say_so(stored):
    choice = choose(stored)
    reasons = {verdict.kernel: verdict.reason for verdict in choice.trace}
    assert choice.verdict.kernel == "tile" or "NVIDIA" in reasons["sliced"]
    assert list(KERNELS.values())[-1] is DenseKernel
