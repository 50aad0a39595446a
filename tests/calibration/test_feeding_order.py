"""The order inside a block and its residual writers, found from runs of hand-made blocks."""

import pytest
import torch
from tiny_models import tiny_bert
from torch import nn
from torch.nn import functional as F
from transformers import BertModel

from hf_sparse.calibration.block_walk import BlockWalk
from hf_sparse.calibration.feeding_order import find_stages
from hf_sparse.calibration.residual_stream import residual_writers
from hf_sparse.layers.blocks import find_blocks

WIDTH = 12


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        return self.o(mix(self.q(x), self.k(x), self.v(x)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20)
        self.down = nn.Linear(20, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm, with residual multipliers; its sublayers one after the other or side by side."""

    def __init__(self, first: float = 1.0, second: float = 1.0, parallel: bool = False) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()
        self.first, self.second, self.parallel = first, second, parallel

    def forward(self, x):
        h = x + self.first * self.attention(norm(x))
        return h + self.second * self.mlp(norm(x if self.parallel else h))


class PostNorm(Block):
    def forward(self, x):
        h = norm(x + self.attention(x))
        return norm(h + self.mlp(h))


class InPlace(Block):
    """Writes into the layers' outputs."""

    def forward(self, x):
        normed = norm(x)
        q = self.attention.q(normed).mul_(0.5)
        h = self.attention.o(mix(q, self.attention.k(normed), self.attention.v(normed)))
        h += x
        normed = norm(h)
        gate = F.silu(self.mlp.gate(normed), inplace=True)
        gate *= self.mlp.up(normed)
        return self.mlp.down(gate).add_(h)


class Tuple(Block):
    """Returns a tuple, as older decoder layers do."""

    def forward(self, x):
        return (super().forward(x), None)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids):
        x = torch.sin(input_ids.float().unsqueeze(-1) * torch.arange(1, WIDTH + 1)).to(self.dtype)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x

    @property
    def dtype(self):
        return next(self.parameters()).dtype


def visits(model: nn.Module, ids: torch.Tensor | None = None):
    """Every visit of a model, with its layers, their names shortened to the last part."""
    ids = (
        torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
        if ids is None
        else ids
    )
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for visit in BlockWalk(model, find_blocks(model, names), [{"input_ids": ids}]):
        yield visit, {n.split(".")[-1]: model.get_submodule(n) for n in visit.block.targets}


def stages(block: nn.Module) -> list[list[str]]:
    torch.manual_seed(0)
    return next(find_stages(visit, layers) for visit, layers in visits(Stack(block).eval()))


def writers(block: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    model = Stack(block).eval().to(dtype)
    return next(residual_writers(visit, layers) for visit, layers in visits(model))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 0.02


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SERIAL = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


@pytest.mark.parametrize("block", [Block, PostNorm, InPlace, Tuple])
def test_layers_are_sorted_by_what_feeds_what(block):
    assert stages(block()) == SERIAL


def test_side_by_side_sublayers_share_their_stages():
    assert stages(Block(parallel=True)) == [["q", "k", "v", "gate", "up"], ["o", "down"]]


def test_a_frozen_model_has_the_same_stages():
    assert stages(Block().requires_grad_(False)) == SERIAL


def test_a_layer_that_is_not_reached_is_in_the_first_stage():
    block = Block()
    block.spare = nn.Linear(WIDTH, WIDTH)
    assert stages(block) == [["q", "k", "v", "spare"], *SERIAL[1:]]


def test_a_layer_that_is_called_twice_comes_after_what_its_last_call_needs():
    class Twice(Block):
        def forward(self, x):
            x = x + self.attention(x)
            return x + self.attention.q(self.mlp(x))

    # q's second call needs down's output.
    assert stages(Twice())[-1] == ["q"]


def test_one_layer_is_one_stage_and_is_not_run():
    visit, layers = next(iter(visits(Stack(nn.Linear(WIDTH, WIDTH)).eval())))
    assert find_stages(visit, layers) == [list(layers)]


def test_finding_stages_leaves_no_hook_no_gradient_and_the_same_outputs():
    model = Stack(Block(), Block()).eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    for visit, layers in visits(model, ids):
        find_stages(visit, layers)
        residual_writers(visit, layers)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in layers.values())
        assert not torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(ids), before)


def test_hooks_are_removed_when_the_block_fails():
    def failing(x):
        block.attention(x)
        raise ValueError("stop")

    block = Block()
    visit, layers = next(iter(visits(Stack(block).eval())))
    block.forward = failing
    for find in (find_stages, residual_writers):
        with pytest.raises(ValueError, match="stop"):
            find(visit, layers)
    assert not any(m._forward_hooks for m in layers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [Block, InPlace, Tuple], ids=lambda b: b.__name__)
def test_what_is_added_to_the_stream_is_found_in_every_precision(block, dtype):
    found = writers(block(), dtype)
    assert list(found) == ["o", "down"]
    assert list(found.values()) == pytest.approx(
        [1, 1], abs=1e-5 if dtype == torch.float32 else 0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_multipliers_are_found(dtype):
    found = writers(Block(0.22, 1.7), dtype)
    assert list(found) == ["o", "down"]
    assert list(found.values()) == pytest.approx(
        [0.22, 1.7], abs=1e-5 if dtype == torch.float32 else 0.02
    )


def test_side_by_side_sublayers_both_write():
    assert list(writers(Block(parallel=True))) == ["o", "down"]


def test_huge_activations_in_the_stream_do_not_hide_what_is_added_to_it():
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = x + self.layer(x)
            x[0, 0, 0] = 3000.0
            return x

    model = Stack(Huge(), Block()).eval().to(torch.bfloat16)
    found = [residual_writers(visit, layers) for visit, layers in visits(model)][1]
    assert list(found) == ["o", "down"]
    assert list(found.values()) == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_whose_output_is_normalised_has_no_writers(dtype):
    assert writers(PostNorm(), dtype) == {}


def test_a_block_without_skip_has_no_writers():
    class Plain(Block):
        def forward(self, x):
            return torch.tanh(self.mlp(self.attention(x)))

    assert writers(Plain()) == {}


def test_an_output_of_another_shape_has_no_writers():
    class Shorter(Block):
        def forward(self, x):
            return super().forward(x)[:, :3]

    assert writers(Shorter()) == {}


def test_bert_has_the_same_stages_and_no_writers():
    model, seen = tiny_bert(BertModel), 0
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    for visit in BlockWalk(model, find_blocks(model, names), [{"input_ids": ids}]):
        layers = {n: model.get_submodule(n) for n in visit.block.targets}
        if len(layers) == 1:
            continue
        seen += 1
        found = [
            [n.split(f"{visit.block.name}.")[1] for n in stage]
            for stage in find_stages(visit, layers)
        ]
        assert found == [
            ["attention.self.query", "attention.self.key", "attention.self.value"],
            ["attention.output.dense"],
            ["intermediate.dense"],
            ["output.dense"],
        ]
        assert residual_writers(visit, layers) == {}
    assert seen == 2


def test_llama_s_stages_and_writers(tiny, token_ids):
    names = [n for n, m in tiny.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for visit in BlockWalk(tiny, find_blocks(tiny, names), [{"input_ids": token_ids}]):
        layers = {n: tiny.get_submodule(n) for n in visit.block.targets}
        found = [[n.split(".")[-1] for n in stage] for stage in find_stages(visit, layers)]
        assert found == [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
        ]
        assert [n.split(".")[-1] for n in residual_writers(visit, layers)] == [
            "o_proj",
            "down_proj",
        ]
