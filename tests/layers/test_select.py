"""Which layers are pruned, which stay dense and why, and what is no target at all."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.core.errors import TargetError
from hf_sparse.formats.bitmask import Bitmask
from hf_sparse.layers import SparseLinear
from hf_sparse.layers.axes import Axes
from hf_sparse.layers.prunable import is_prunable
from hf_sparse.layers.routers import find_routers
from hf_sparse.layers.select import (
    Target,
    layer_sparsity,
    matches,
    require_match,
    select_targets,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 6), nn.Linear(4, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = Attention(), Conv1D(5, 4)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    """Twelve blocks, so that there is a layers.1 and a layers.11; the head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def net() -> Net:
    return Net()


def names(selection) -> list[str]:
    return [target.name for target in selection.targets]


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "layers.0.attn.q_proj", True),
        ("q_proj", "layers.0.attn.xq_proj", False),
        ("q_proj", "layers.0.attn.q_proj_2", False),
        ("q_proj", "q_proj", True),
        ("layers.1", "layers.1.attn.q_proj", True),
        ("layers.1", "layers.11.attn.q_proj", False),
        (r"layers\.1", "layers.1", True),
        ("attn", "layers.0.attn.q_proj", True),
        ("q_proj|k_proj", "layers.0.attn.k_proj", True),
        ("q|k_proj", "layers.0.attn.k_proj", True),
        ("q|k_proj", "layers.0.attn.q_proj", False),
        ("[qk]_proj", "attn.q_proj", True),
        (".*_proj", "layers.0.attn.q_proj", True),
        (r"layers\.\d+\.attn", "layers.10.attn.q_proj", True),
        ("^layers.0", "layers.0.fc", True),
        ("^attn", "layers.0.attn.q_proj", False),
        ("q_proj$", "layers.0.attn.q_proj", True),
        ("layers.0.attn.q_proj", "layers.0.attn.q_proj", True),
        ("LAYERS", "layers.0", False),
    ],
)
def test_a_regex_matches_whole_components_of_a_name(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_the_first_regex_that_matches_gives_the_sparsity():
    sparsities = {"layers.1": 0.3, "q_proj": 0.7, "layers": 0.5}
    assert layer_sparsity(sparsities, "layers.1.q_proj") == 0.3
    assert layer_sparsity(sparsities, "layers.11.q_proj") == 0.7
    assert layer_sparsity(sparsities, "layers.11.fc") == 0.5
    assert layer_sparsity(sparsities, "head") is None


def test_a_regex_without_match_is_an_error_with_near_names(net):
    with pytest.raises(TargetError, match=r"'q_porj' matches no linear layer.*\bq_proj\b"):
        require_match("q_porj", ["layers.0.attn.q_proj", "layers.0.fc"])
    require_match("q_proj", ["layers.0.attn.q_proj"])


def test_without_near_names_the_error_shows_some_layers():
    with pytest.raises(TargetError, match=r"e\.g\. layers\.0\.fc"):
        require_match("zzzzzz", ["layers.0.fc"])


# --- modules --------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnInit(nn.Linear):
    pass


class OtherWords(nn.Linear):
    """Falcon's: W x + b, said in another way."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class OtherWordsAndState(OtherWords):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.scale = 2.0


class OwnConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean())


class TwoResults(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("module", "prunable"),
    [
        (nn.Linear(3, 2), True),
        (Conv1D(3, 2), True),
        (OwnInit(3, 2), True),
        (OwnForward(3, 2), False),
        (OtherWords(3, 2), True),
        (OtherWordsAndState(3, 2), False),
        (TwoResults(3, 2), False),
        (nn.MultiheadAttention(4, 2).out_proj, False),
        (nn.Embedding(3, 2), False),
        (nn.LayerNorm(3), False),
        (nn.Conv1d(3, 2, 1), True),
        (nn.Conv2d(3, 2, (1, 1)), True),
        (nn.Conv2d(3, 2, 1, padding="same"), True),
        (nn.Conv1d(3, 2, 2), False),
        (nn.Conv2d(3, 2, (1, 3)), False),
        (nn.Conv2d(3, 2, 1, stride=2), False),
        (nn.Conv2d(4, 2, 1, groups=2), False),
        (nn.Conv2d(3, 2, 1, padding=1), False),
        (nn.ConvTranspose2d(3, 2, 1), False),
        (OwnConvolution(3, 2, 1), False),
        (nn.Bilinear(3, 2, 2), False),
        (SparseLinear(Bitmask(), Bitmask().pack(torch.eye(2)), (2, 2), torch.float32), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dense_linear_layers_are_prunable_and_nothing_else(module, prunable):
    assert is_prunable(module) is prunable


def test_a_subclass_is_judged_the_same_while_a_model_is_built_on_meta():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    with torch.device("meta"):
        assert is_prunable(Own(3, 2))


def test_a_linear_target_shows_its_weight_as_it_is():
    module = nn.Linear(4, 6)
    target = Target("fc", module)
    assert target.shape == (6, 4)
    assert target.axes == Axes()
    with target.weight() as weight:
        assert torch.equal(weight, module.weight)
        assert not (2 * weight).requires_grad


def test_a_conv1d_target_shows_its_weight_as_out_by_in():
    module = Conv1D(5, 4)
    target = Target("fc", module)
    assert target.shape == (5, 4)
    assert target.axes.transposed
    with target.weight() as weight:
        assert weight.shape == (5, 4)
        # As a linear layer reads it: y_i = sum_j W_ij x_j + b_i.
        x = torch.tensor([1.0, -2.0, 0.5, 3.0])
        expected = [
            sum(float(weight[i, j]) * float(x[j]) for j in range(4)) + float(module.bias[i])
            for i in range(5)
        ]
    torch.testing.assert_close(module(x), torch.tensor(expected))


# --- selection ------------------------------------------------------------------------------


def test_without_targets_every_linear_layer_is_taken_but_those_dense_by_default(net):
    selection = select_targets(net, None, None, {"layers.3.fc": "the model keeps it in fp32"})
    assert len(selection.targets) == 35
    assert names(selection)[:3] == ["layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.fc"]
    assert selection.left_dense["layers.3.fc"] == "the model keeps it in fp32"
    assert selection.left_dense["head"] == "its weight is tied to embed"
    assert len(selection.left_dense) == 2


def test_targets_select_and_the_others_are_left_dense_with_the_reason(net):
    selection = select_targets(net, ["layers.1", "layers.2.fc"], None, {})
    assert names(selection) == [
        "layers.1.attn.q_proj",
        "layers.1.attn.k_proj",
        "layers.1.fc",
        "layers.2.fc",
    ]
    assert selection.left_dense["layers.11.fc"] == "no target matches it"
    assert selection.left_dense["head"] == "no target matches it"


def test_an_explicit_target_wins_over_what_is_dense_by_default(net):
    selection = select_targets(net, ["layers.3.fc"], None, {"layers.3.fc": "kept in fp32"})
    assert names(selection) == ["layers.3.fc"]


def test_modules_to_not_convert_replace_the_default_and_win_over_targets(net):
    default = {"layers.3.fc": "kept in fp32"}
    selection = select_targets(net, None, ["attn", "layers.0"], default)
    assert names(selection) == [f"layers.{i}.fc" for i in range(1, 12)]
    assert selection.left_dense["layers.0.fc"] == "in modules_to_not_convert"
    both = select_targets(net, ["layers.1"], ["attn"], default)
    assert names(both) == ["layers.1.fc"]


def test_every_linear_layer_is_either_chosen_or_left_dense(net):
    selection = select_targets(net, ["q_proj", "fc"], ["layers.0"], {"layers.1.fc": "default"})
    linear = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    assert sorted([*names(selection), *selection.left_dense]) == sorted(linear)


def test_convolutions_that_are_not_pointwise_are_left_dense_with_the_reason():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1),
        nn.Conv1d(4, 4, 1, 2),
    )
    net.append(OwnConvolution(4, 4, 1)).append(nn.Conv2d(4, 4, 1, groups=2))
    net.append(nn.Conv3d(4, 4, 1)).append(nn.Conv2d(4, 4, 1, padding=1))
    selection = select_targets(net, None, None, {})
    assert names(selection) == ["2"]
    assert selection.targets[0].shape == (4, 8)
    assert selection.left_dense == {
        "0": "a convolution of kernel size 4x4, no linear layer",
        "1": "a convolution of kernel size 3x3, no linear layer",
        "3": "a convolution of stride 2, no linear layer",
        "4": "OwnConvolution computes in a way of its own, no linear layer",
        "5": "a convolution of 2 groups, no linear layer",
        "6": "Conv3d, no linear layer",
        "7": "a convolution that pads its inputs, no linear layer",
    }


def test_two_layers_that_share_a_weight_stay_dense(net):
    net.layers[0].attn.k_proj.weight = net.layers[0].attn.q_proj.weight
    selection = select_targets(net, None, None, {})
    assert selection.left_dense["layers.0.attn.q_proj"] == (
        "its weight is tied to layers.0.attn.k_proj"
    )
    assert selection.left_dense["layers.0.attn.k_proj"] == (
        "its weight is tied to layers.0.attn.q_proj"
    )


def test_two_parameters_on_one_memory_count_as_one(net):
    q, k = net.layers[0].attn.q_proj, net.layers[0].attn.k_proj
    k.weight = nn.Parameter(q.weight.data)
    selection = select_targets(net, None, None, {})
    assert selection.left_dense["layers.0.attn.k_proj"].startswith("its weight is tied to")
    assert "layers.0.attn.q_proj" in selection.left_dense


def test_a_shared_bias_does_not_make_a_weight_tied(net):
    net.layers[0].attn.k_proj.bias = net.layers[0].attn.q_proj.bias
    assert "layers.0.attn.q_proj" in names(select_targets(net, None, None, {}))


def test_a_tied_weight_that_is_asked_for_is_an_error(net):
    with pytest.raises(TargetError, match="head can't be pruned: its weight is tied to embed"):
        select_targets(net, ["head"], None, {})


@pytest.mark.parametrize(("targets", "dense"), [(["q_prj"], None), (None, ["q_prj"])])
def test_a_regex_that_selects_nothing_is_an_error_wherever_it_stands(net, targets, dense):
    with pytest.raises(TargetError, match=r"'q_prj' matches no linear layer.*q_proj"):
        select_targets(net, targets, dense, {})


def test_the_name_of_a_module_without_linear_layers_is_an_error(net):
    with pytest.raises(TargetError, match="'norm' matches no linear layer"):
        select_targets(net, ["norm"], None, {})


def test_nothing_left_to_prune_is_an_error_with_the_reasons(net):
    with pytest.raises(TargetError, match=r"nothing to prune in Net .*modules_to_not_convert"):
        select_targets(net, None, [".*"], {})


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(TargetError, match="no linear layer"):
        select_targets(nn.Sequential(nn.Embedding(3, 2)), None, None, {})


def test_sparse_layers_are_not_pruned_again(net):
    fmt = Bitmask()
    net.layers[0].fc = SparseLinear(fmt, fmt.pack(torch.ones(5, 4)), (5, 4), torch.float32)
    selection = select_targets(net, None, None, {})
    assert "layers.0.fc" not in [*names(selection), *selection.left_dense]


# --- routers and experts --------------------------------------------------------------------


class TinyTopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 3)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(3, 4, 10))


class Mixture(nn.Module):
    """Three experts, each kind of router, and what is no router."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.gate, self.shared_gate = TinyTopKRouter(), nn.Linear(4, 3), Conv1D(1, 4)
        self.latent, self.experts = nn.Linear(4, 4), experts


@pytest.mark.parametrize("modules", [True, False], ids=["per expert", "fused"])
def test_routers_stay_dense_by_default_and_other_layers_beside_experts_do_not(modules):
    model = nn.Module()
    model.mlp = Mixture(nn.ModuleList(nn.Linear(4, 5) for _ in range(3)) if modules else Fused())
    routers = find_routers(model)
    assert routers == {
        "mlp.router.scores": "it is part of the router mlp.router",
        "mlp.gate": "it routes tokens to mlp.experts",
        "mlp.shared_gate": "it routes tokens to mlp.experts",
    }
    selection = select_targets(model, None, None, {})
    experts = [f"mlp.experts.{i}" for i in range(3)] if modules else []
    assert names(selection) == ["mlp.latent", *experts]
    fused = {} if modules else {"mlp.experts.gate_up_proj": FUSED}
    assert selection.left_dense == {**routers, **fused}
    assert names(select_targets(model, ["mlp.gate"], None, {})) == ["mlp.gate"]
    model.other = nn.Linear(4, 4)
    kept = select_targets(model, None, ["latent"], {})
    assert kept.left_dense == {**routers, **fused, "mlp.latent": "in modules_to_not_convert"}


@pytest.mark.parametrize("held", ["experts", "mlps", "ffns"])
@pytest.mark.parametrize("router", ["router", "gate", "gating", "switch_net", "wg"])
@pytest.mark.parametrize("deep", [False, True])
def test_routers_are_told_by_their_names_and_scores_whatever_holds_the_experts(held, router, deep):
    parts = {str(i): nn.Linear(4, 4) for i in range(3)}
    model = nn.Module()
    model.mlp = nn.Module()
    setattr(model.mlp, held, nn.ModuleDict(parts) if deep else nn.ModuleList(parts.values()))
    scores = nn.Linear(4, 3)
    setattr(
        model.mlp, router, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), scores) if deep else scores
    )
    model.mlp.gate_proj, model.mlp.other = nn.Linear(4, 3), nn.Linear(4, 2)
    found = [f"mlp.{router}.0", f"mlp.{router}.2"] if deep else [f"mlp.{router}"]
    if held == "experts":  # then every layer that gives a score for each is one
        found.append("mlp.gate_proj")
    assert find_routers(model) == dict.fromkeys(found, f"it routes tokens to mlp.{held}")


def test_fused_experts_with_one_weight_between_them_are_left_dense_as_tied():
    model = nn.ModuleDict({name: Mixture(Fused()) for name in "abc"})
    model["b"].experts.gate_up_proj = model["a"].experts.gate_up_proj
    selection = select_targets(model, None, None, {})
    fused = {name: why for name, why in selection.left_dense.items() if "experts" in name}
    assert fused == {
        "a.experts.gate_up_proj": "its weight is tied to b.experts.gate_up_proj",
        "b.experts.gate_up_proj": "its weight is tied to a.experts.gate_up_proj",
        "c.experts.gate_up_proj": FUSED,
    }


FUSED = "fused experts are one 3-D parameter, not linear layers"
