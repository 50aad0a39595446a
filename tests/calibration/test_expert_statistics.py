"""Statistics of experts: of the tokens routed to each, and of all where these are few."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_sparse.calibration.block_walk import BlockWalk
from hf_sparse.calibration.experts import observe
from hf_sparse.calibration.layer_statistics import DensePath
from hf_sparse.core.statistics import Needs
from hf_sparse.layers.blocks import find_blocks
from hf_sparse.layers.experts import unfuse

HIDDEN, INNER, EXPERTS, K = 6, 5, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS
        )
        self.before, self.experts = nn.Linear(HIDDEN, HIDDEN), MixtralExperts(config)

    def choose(self, rows):
        """The last expert is never chosen; what is chosen depends on the input alone."""
        return rows[:, : EXPERTS - 1].topk(K).indices

    def forward(self, x):
        rows = self.before(x).reshape(-1, HIDDEN)
        chosen = self.choose(rows)
        return x + self.experts(rows, chosen, torch.ones_like(chosen) / K).view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])
        self.last = nn.Linear(HIDDEN, 2)

    def forward(self, x, attention_mask=None):
        return self.last(self.layers[0](x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    unfuse(model, model.layers[0].experts)
    return model


def names(expert: int) -> tuple[str, str]:
    prefix = f"layers.0.experts.{expert}"
    return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"


LAYERS = ["layers.0.before", *(n for e in range(EXPERTS) for n in names(e))]


def make_batches(padding: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(2, 4, HIDDEN, generator=generator)} for _ in range(3)]
    for batch in batches if padding else ():
        mask = torch.ones(2, 4, dtype=torch.long)
        mask[1, 4 - padding :] = 0
        batch["attention_mask"] = mask
    return batches


def seen(model, batches, needs=Needs.HESSIAN, **settings):
    """What was observed in the block."""
    with torch.no_grad():
        visit = next(iter(BlockWalk(model, find_blocks(model, LAYERS), batches)))
        layers = {name: model.get_submodule(name) for name in visit.block.targets}
        return observe(visit, layers, needs, **settings)


def rows_of(model, batches):
    """In float64: what enters the experts, and the experts chosen for it; no padding."""
    block = model.layers[0]
    weight, bias = block.before.weight.double(), block.before.bias.double()
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones(2, 4)).flatten().bool()
        rows.append((batch["x"].reshape(-1, HIDDEN)[mask].double() @ weight.T) + bias)
    rows = torch.cat(rows)
    return rows, block.choose(rows)


def inner(model, expert, rows):
    """In float64: what enters an expert's second layer."""
    weight = model.layers[0].experts.layers(expert)[0].weight.double()
    x = rows @ weight.T
    gate, up = x[:, :INNER], x[:, INNER:]
    return gate * torch.sigmoid(gate) * up


def mean_outer(rows):
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row)
    return total / max(1, len(rows))


def assert_hessians(model, found, expert, expected):
    for name, hessian in zip(names(expert), expected, strict=True):
        got = found[name].statistics.hessian.double()
        torch.testing.assert_close(got, hessian, rtol=1e-4, atol=1e-5)


# 4 tokens of padding: then an expert can have as many rows as the mask has tokens.
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_an_expert_sees_the_tokens_that_are_routed_to_it(model, padding):
    batches = make_batches(padding)
    found = seen(model, batches, min_tokens=0)
    rows, chosen = rows_of(model, batches)
    for expert in range(EXPERTS - 1):
        own = rows[(chosen == expert).any(dim=1)]
        assert [found[n].statistics.tokens for n in names(expert)] == [len(own)] * 2
        hessians = mean_outer(own), mean_outer(inner(model, expert, own))
        assert_hessians(model, found, expert, hessians)
        assert all(found[n].note is None for n in names(expert))


def test_an_expert_that_all_tokens_reach_counts_no_padding(model):
    model.layers[0].choose = lambda rows: torch.tensor([[0, 1]]).expand(len(rows), K)
    batches = make_batches(padding=3)
    found = seen(model, batches, min_tokens=0)
    rows, _ = rows_of(model, batches)
    assert found[names(0)[0]].statistics.tokens == len(rows) == 15
    assert_hessians(model, found, 0, (mean_outer(rows), mean_outer(inner(model, 0, rows))))


@pytest.mark.parametrize("padding", [0, 2])
def test_what_an_expert_lacks_in_tokens_is_filled_up_with_all(model, padding):
    batches, limit = make_batches(padding), 40
    found = seen(model, batches, min_tokens=limit)
    rows, chosen = rows_of(model, batches)
    for expert in range(EXPERTS):
        own = rows[(chosen == expert).any(dim=1)]
        share = len(own) / limit
        assert share < 1
        expected = []
        for mine, shared in ((own, rows), (inner(model, expert, own), inner(model, expert, rows))):
            expected.append(share * mean_outer(mine) + (1 - share) * mean_outer(shared))
        assert_hessians(model, found, expert, expected)
        for name in names(expert):
            squares = found[name].statistics.column_norms.double().square()
            torch.testing.assert_close(
                squares, expected[names(expert).index(name)].diagonal(), rtol=1e-4, atol=1e-5
            )
            assert found[name].statistics.tokens == len(own)
            assert found[name].note.startswith(f"{len(own)} calibration tokens were routed to it")
            assert f"mean of all {len(rows)} " in found[name].note
    assert found["layers.0.before"].note is None


def test_the_default_limit_is_the_number_of_a_layers_inputs(model):
    batches = make_batches()
    found = seen(model, batches)
    for expert in range(EXPERTS):
        for name, limit in zip(names(expert), (HIDDEN, INNER), strict=True):
            few = found[name].statistics.tokens < limit
            assert (found[name].note is not None) == few
    assert found[names(EXPERTS - 1)[0]].note is not None


@pytest.mark.parametrize("needs", list(Needs))
def test_an_expert_that_no_token_reaches_has_the_statistics_of_all(model, needs):
    batches = make_batches()
    found = seen(model, batches, needs, min_tokens=0)
    rows, _ = rows_of(model, batches)
    name = names(EXPERTS - 1)[0]
    assert found[name].statistics.tokens == 0
    assert "0 calibration tokens" in found[name].note
    assert len(found[name].statistics.sample) == len(rows)
    if needs is Needs.HESSIAN:
        last = EXPERTS - 1
        assert_hessians(
            model, found, last, (mean_outer(rows), mean_outer(inner(model, last, rows)))
        )


def test_all_experts_can_see_all_tokens_while_outputs_stay_the_routed_ones(model):
    batches = make_batches(padding=1)
    with torch.no_grad():
        expected = [model(**batch) for batch in batches]
    found = seen(model, batches, everywhere=True)
    rows, _ = rows_of(model, batches)
    for expert in range(EXPERTS):
        assert [found[n].statistics.tokens for n in names(expert)] == [len(rows)] * 2
        hessians = mean_outer(rows), mean_outer(inner(model, expert, rows))
        assert_hessians(model, found, expert, hessians)
    blocks = find_blocks(model, [*LAYERS, "last"])
    with torch.no_grad():
        for visit in BlockWalk(model, blocks, batches):
            layers = {name: model.get_submodule(name) for name in visit.block.targets}
            observe(visit, layers, Needs.HESSIAN, everywhere=True)
            reached = [call.args[0] for call in visit.calls]
        outputs = [model.last(x) for x in reached]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_dense_models_inputs_are_those_of_the_same_tokens(model, everywhere):
    # The pruned model: what stands before the experts is changed, and with it the routing.
    batches = make_batches()
    before = model.layers[0].before
    dense_weight = before.weight.data
    dense_rows, dense_chosen = rows_of(model, batches)
    pruned_weight = dense_weight + 0.3 * torch.randn(HIDDEN, HIDDEN)

    @contextmanager
    def dense():
        before.weight.data = dense_weight
        try:
            yield
        finally:
            before.weight.data = pruned_weight

    blocks = find_blocks(model, [*LAYERS, "last"])
    reached_last = []
    with torch.no_grad():
        for visit in BlockWalk(model, blocks, batches, carry_dense=True):
            if visit.block.name == "last":
                reached_last.append(len(visit.dense_calls))
                break
            before.weight.data = pruned_weight
            layers = {name: model.get_submodule(name) for name in visit.block.targets}
            path = DensePath(dense, leave=True)
            found = observe(visit, layers, Needs.HESSIAN, path, 0, everywhere)
    assert reached_last == [len(batches)]
    rows, chosen = rows_of(model, batches)
    assert not torch.equal(chosen, dense_chosen)
    for expert in range(EXPERTS - 1):
        cross = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
        count = strays = 0
        for token, row in enumerate(rows):
            if everywhere or expert in chosen[token]:
                same = everywhere or expert in dense_chosen[token]
                cross += torch.outer(dense_rows[token] if same else row, row)
                count += 1
                strays += not same
        got = found[names(expert)[0]].statistics.cross.double()
        torch.testing.assert_close(got, cross / count, rtol=1e-4, atol=1e-5)
        words = (
            f"the dense model sends {strays} of its tokens elsewhere: its own outputs stay there"
        )
        assert found[names(expert)[0]].note == (words if strays else None)
