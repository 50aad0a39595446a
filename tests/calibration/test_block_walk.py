"""Walking models whose blocks are shared, nested, cached, or never called."""

import pytest
import torch
from torch import nn

from hf_sparse.calibration.block_walk import BlockWalk
from hf_sparse.calibration.layer_statistics import collect_statistics
from hf_sparse.core.errors import CalibrationError
from hf_sparse.core.statistics import Needs
from hf_sparse.layers.blocks import find_blocks


class Shared(nn.Module):
    """One block, three times; writes over its activations after each call."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh())])
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        x = x.clone()
        for _ in range(3):
            y = self.layers[0](x) + 0.5
            x.zero_()
            x = y
        return self.last(x)


def walk(model, names, batches):
    """Visit each block and collect the Hessians of its layers, in the order of the visits."""
    visits = {}
    blocks = find_blocks(model, names)
    with torch.no_grad():
        for visit in BlockWalk(model, blocks, batches):
            layers = {name: model.get_submodule(name) for name in visit.block.targets}
            visits[visit.block.name] = collect_statistics(visit, layers, Needs.HESSIAN)
    return visits


def test_a_block_that_is_called_three_times_gets_the_statistics_of_all_calls():
    torch.manual_seed(0)
    model = Shared().eval()
    batches = [{"x": torch.randn(5, 6)} for _ in range(2)]
    # Independently, in float64: what enters the layer at each of its calls.
    weight, bias = (p.detach().double() for p in model.layers[0][0].parameters())
    entering = []
    for batch in batches:
        x = batch["x"].double()
        for _ in range(3):
            entering.append(x)
            x = (x @ weight.T + bias).tanh() + 0.5
    rows = torch.cat(entering)
    found = walk(model, ["layers.0.0", "last"], batches)["layers.0"]["layers.0.0"]
    assert found.statistics.tokens == len(rows) == 30
    torch.testing.assert_close(found.statistics.hessian.double(), rows.T @ rows / len(rows))


def test_what_follows_a_shared_block_sees_its_pruned_outputs():
    torch.manual_seed(0)
    model = Shared().eval()
    batch = {"x": torch.randn(5, 6)}
    blocks = find_blocks(model, ["layers.0.0", "last"])
    hessians = {}
    with torch.no_grad():
        for visit in BlockWalk(model, blocks, [batch]):
            layers = {name: model.get_submodule(name) for name in visit.block.targets}
            hessians |= collect_statistics(visit, layers, Needs.HESSIAN)
            if visit.block.name == "layers.0":
                model.layers[0][0].weight.zero_()
    x = model.layers[0][0].bias.detach().tanh() + 0.5
    torch.testing.assert_close(hessians["last"].statistics.hessian, torch.outer(x, x))


def test_a_list_inside_a_list_is_no_block_but_its_elements_are():
    model = nn.Module()
    model.stages = nn.ModuleList(
        nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)) for _ in range(2)
    )
    names = [f"stages.{i}.{j}.0" for i in range(2) for j in range(2)]
    assert [block.name for block in find_blocks(model, names)] == [
        "stages.0.0",
        "stages.0.1",
        "stages.1.0",
        "stages.1.1",
    ]


class Cache:
    """Grows at every call, as key-value caches do."""

    def __init__(self):
        self.seen = []

    def get_seq_length(self):
        return sum(len(x) for x in self.seen)


class CachedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(4, 4)

    def forward(self, x, cache):
        cache.seen.append(self.key(x))
        return torch.cat(cache.seen)[: len(x)]


class Cached(nn.Module):
    """Keeps a cache although nobody asked for one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([CachedBlock()])
        self.lengths = []

    def forward(self, x):
        cache = Cache()
        y = self.layers[0](x, cache=cache)
        self.lengths.append(cache.get_seq_length())
        return y


def test_running_a_block_again_leaves_the_models_own_cache_alone():
    model = Cached().eval()
    blocks = find_blocks(model, ["layers.0.key"])
    with torch.no_grad():
        for visit in BlockWalk(model, blocks, [{"x": torch.randn(3, 4)}]):
            (call,) = visit.calls
            cache = call.kwargs["cache"]
            for _ in range(2):
                visit.run(visit.block, call)
            assert cache.get_seq_length() == 0


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y):
        return self.always(x) + (0 if y is None else self.sometimes(y))


class Parted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Part()])

    def forward(self, x, y=None):
        return self.layers[0](x, y)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 100)

    def forward(self, x):
        return self.head(self.layers[1](self.layers[0](x)))


def test_a_layer_of_a_block_that_is_never_called_has_no_statistics():
    names = ["layers.0.always", "layers.0.sometimes"]
    x = torch.randn(3, 4)
    assert list(walk(Parted(), names, [{"x": x}])["layers.0"]) == names[:1]
    # One batch of two is enough.
    assert list(walk(Parted(), names, [{"x": x}, {"x": x, "y": x}])["layers.0"]) == names


class Direct(nn.Module):
    """Calls its blocks' `forward`, so that no hook of theirs runs (SqueezeBERT does)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x


def test_layers_of_a_block_that_is_not_called_as_a_module_are_units_of_their_own():
    torch.manual_seed(0)
    model, x = Direct(), torch.randn(3, 4)
    found = walk(model, ["layers.0.0", "layers.1.0"], [{"x": x}])
    assert list(found) == ["layers.0.0", "layers.1.0"]
    y = model.layers[0][0](x).detach()
    torch.testing.assert_close(
        found["layers.1.0"]["layers.1.0"].statistics.hessian, y.T @ y / len(y)
    )


def test_a_unit_that_is_never_called_has_no_visit():
    model = Shared()
    model.spare = nn.Linear(6, 6)
    assert list(walk(model, ["layers.0.0", "spare"], [{"x": torch.randn(2, 6)}])) == ["layers.0"]


def test_a_model_that_cannot_run_on_the_data_names_both():
    with pytest.raises(
        CalibrationError, match=r"Parted can't run.*data have z; it also takes x, y"
    ):
        walk(Parted(), ["layers.0.always"], [{"z": torch.randn(3, 4)}])


def test_what_follows_the_last_unit_is_not_run_for_the_dense_model():
    # With a large vocabulary the head takes longer than the blocks.
    model = Chain().eval()
    batches = [{"x": torch.randn(3, 4)} for _ in range(3)]
    heads = []
    model.head.register_forward_hook(lambda *_: heads.append(1))
    inner = []
    with torch.no_grad():
        for visit in BlockWalk(model, find_blocks(model, ["layers.0", "layers.1"]), batches, True):
            hook = visit.block.module.register_forward_hook(lambda m, a, y: inner.append(y))
            for call in visit.dense_calls:
                visit.leave_dense(call)
            hook.remove()
    assert len(inner) == 6
    x = batches[2]["x"]
    torch.testing.assert_close(inner[5], model.layers[1](model.layers[0](x)))
    assert len(heads) == 1  # the pass that finds out what is called how often
