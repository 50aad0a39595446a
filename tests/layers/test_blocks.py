"""What is pruned at once: blocks that are found, and blocks that are named."""

import copy
import logging

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.core.errors import TargetError
from hf_sparse.layers.blocks import find_blocks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x):
        return self.second(self.first(x))


class Net(nn.Module):
    """Two stages of two layers, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.stage_a, self.stage_b, self.last = Stage(), Stage(), nn.Linear(4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(4)])

    def forward(self, x):
        return self.last(self.norms[0](self.stage_b(self.stage_a(x))))


class Listed(nn.Module):
    """The same in a list, where blocks are found."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.stages = nn.ModuleList([net.stage_a, net.stage_b])
        self.last, self.norms = net.last, net.norms

    def forward(self, x):
        return self.last(self.norms[0](self.stages[1](self.stages[0](x))))


LAYERS = [
    f"stage_{s}.{part}.{side}"
    for s in "ab"
    for part in ("first", "second")
    for side in ("up", "down")
]
NAMES = [*LAYERS, "last"]
DATA = [{"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(i))} for i in range(3)]


def targets_of(blocks) -> dict[str, tuple[str, ...]]:
    return {block.name: block.targets for block in find_blocks(Net(), NAMES, blocks)}


def test_named_blocks_hold_their_layers_and_others_are_on_their_own():
    assert targets_of(["stage_."]) == {
        "stage_a": tuple(LAYERS[:4]),
        "stage_b": tuple(LAYERS[4:]),
        "last": ("last",),
    }
    found = targets_of([r"stage_a\.(first|second)", "stage_b"])
    assert list(found) == ["stage_a.first", "stage_a.second", "stage_b", "last"]


def test_a_regex_matches_the_end_of_a_name_in_whole_components():
    assert set(targets_of(["second"])) == {
        *["stage_a.second", "stage_b.second", "last"],
        *[n for n in LAYERS if "first" in n],
    }
    with pytest.raises(TargetError, match="matches none"):
        targets_of(["econd"])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["stage_c"], r"'stage_c' matches none of the \d+ modules of Net .*near names: stage_"),
        (["stage_a", "zzz"], r"'zzz' matches none .*modules are e\.g\. stage_a"),
        (["norms"], "matches none"),  # a list is never called
        (["norms.0"], r"matches norms\.0, in which no layer is to be pruned.*stage_a\.first\.up"),
        (["stage_a", "first"], r"matches stage_a\.first and also stage_a, which it is part of"),
        ([".*"], "which it is part of"),
    ],
)
def test_blocks_that_cannot_be_are_errors_that_say_what_was_looked_at(blocks, message):
    with pytest.raises(TargetError, match=message):
        targets_of(blocks)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TargetError, match=message):
        hf_sparse.prune(model, SparseConfig(dataset=DATA, blocks=blocks))
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


def test_pruning_in_named_blocks_is_pruning_of_a_list_of_them():
    torch.manual_seed(0)
    model = Net()
    listed = Listed(copy.deepcopy(model))
    named = hf_sparse.prune(model, SparseConfig(dataset=DATA, blocks=["stage_."]))
    found = hf_sparse.prune(listed, SparseConfig(dataset=DATA))
    errors = [layer.relative_error for layer in named.layers]
    assert errors == [layer.relative_error for layer in found.layers]
    assert len(set(errors)) == 9


def test_a_model_without_blocks_is_pruned_layer_by_layer_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    report = hf_sparse.prune(Net(), SparseConfig(dataset=DATA))
    assert len(report.layers) == 9
    assert "no blocks were found in Net" in caplog.text
    assert "stage_a (Stage), stage_b (Stage), last (Linear)" in caplog.text
    assert "blocks=" in caplog.text
    caplog.clear()
    hf_sparse.prune(Net(), SparseConfig(dataset=DATA, blocks=["stage_."]))
    assert "no blocks" not in caplog.text
