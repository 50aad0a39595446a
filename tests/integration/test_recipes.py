"""Recipes on whole models: what they are better at, exact counts, and models of every kind."""

import itertools
import math
from functools import cache

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import align_module_device
from tiny_models import tiny_bert, tiny_t5
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.config.recipes import RECIPES
from hf_sparse.core.errors import CalibrationError, ConfigError, SolveError, TargetError

RECIPE_NAMES = list(RECIPES)
every_recipe = pytest.mark.parametrize("method", RECIPE_NAMES)
# Each recipe and each way of stages once; all pairs in the slow tests.
OFTEN = [("fast", False), ("balanced", True), ("best", True)]
every_recipe_in_stages = pytest.mark.parametrize(
    ("method", "stages"),
    [
        pytest.param(*pair, marks=[] if pair in OFTEN else pytest.mark.slow)
        for pair in itertools.product(RECIPE_NAMES, [False, True])
    ],
)


class Example:
    """The model under examples/, pruned by 16 x 128 tokens and measured on as many others."""

    def __init__(self, model_path, data_path) -> None:
        self.path = model_path
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.calibration, self.evaluation = (
            tokenizer((data_path / name).read_text(), return_tensors="pt")
            .input_ids[0][: 16 * 128]
            .view(16, 128)
            for name in ("calibration.txt", "evaluation.txt")
        )

    def pruned(self, **arguments):
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        # Two of eight blocks show what there is to see in less time.
        arguments = {"targets": ["layers.[01]"], "dataset": list(self.calibration), **arguments}
        return model, hf_sparse.prune(model, SparseConfig(**arguments))

    @cache  # noqa: B019 - lives as long as the module
    def at_60(self, method):
        return self.pruned(sparsity=0.6, method=method)

    @torch.no_grad()
    def perplexity(self, model) -> float:
        scores = model(self.evaluation).logits[:, :-1].flatten(0, 1)
        return math.exp(nn.functional.cross_entropy(scores, self.evaluation[:, 1:].flatten()))


@pytest.fixture(scope="module")
def example(request):
    root = request.config.rootpath / "examples"
    return Example(root / "models" / "tiny-llama-docs", root / "data")


def count_zeros(model, report) -> list[int]:
    return [int((model.get_submodule(x.name).weight == 0).sum()) for x in report.layers]


def sizes(report) -> list[int]:
    return [layer.shape[0] * layer.shape[1] for layer in report.layers]


def test_the_better_recipe_has_the_better_perplexity(example):
    found = [example.perplexity(example.at_60(m)[0]) for m in ("sparsegpt", "fast", "best")]
    assert found[0] > found[1] > found[2]


def test_the_refit_lowers_every_layer_s_error(example):
    plain, fast = (example.at_60(m)[1].layers for m in ("sparsegpt", "fast"))
    first = [layer.name for layer in plain if "layers.0." in layer.name]
    errors = [{x.name: x.relative_error for x in layers} for layers in (plain, fast)]
    # The first block's inputs are the same.
    assert all(errors[1][name] < errors[0][name] for name in first)
    assert sum(errors[1].values()) < 0.9 * sum(errors[0].values())


def test_best_spreads_the_sparsity_and_meets_the_budget_to_the_zero(example):
    model, report = example.at_60("best")
    zeros = count_zeros(model, report)
    assert zeros == [layer.zeros for layer in report.layers]
    assert sum(zeros) == sum(60 * n // 100 for n in sizes(report))
    shares = [z / n for z, n in zip(zeros, sizes(report), strict=True)]
    assert 0.45 - 1e-3 <= min(shares) < 0.58
    assert 0.62 < max(shares) <= 0.75 + 1e-3


def test_best_makes_every_group_of_two_to_four_exact(example):
    model, report = example.pruned(method="best", pattern="2:4", targets=["layers.0"])
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert bool(((weight.view(-1, 4) != 0).sum(dim=1) == 2).all())
    uniform = {layer.zeros / n for layer, n in zip(report.layers, sizes(report), strict=True)}
    assert uniform == {0.5}


# From here on: two random blocks, in a blink.


def prune(model, data, **arguments):
    arguments.setdefault("sparsity", 0.5)
    return hf_sparse.prune(model, SparseConfig(dataset=data, **arguments))


def copies(model, count: int) -> list:
    found = []
    for _ in range(count):
        other = type(model)(model.config).eval()
        other.load_state_dict(model.state_dict())
        found.append(other)
    return found


def batches(token_ids) -> list:
    return list(token_ids.repeat(2, 1)[:16])


def weights_of(model, report) -> dict:
    return {x.name: model.get_submodule(x.name).weight for x in report.layers}


@pytest.mark.parametrize("allocation", ["owl", "fisher", {"layers.0": 0.3, "q_proj": 0.8}])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "best"])
def test_every_allocation_meets_the_budget_to_the_zero(tiny, token_ids, method, allocation):
    report = prune(tiny, batches(token_ids), method=method, allocation=allocation, sparsity=0.57)
    budget = sum(57 * n // 100 for n in sizes(report))
    assert sum(count_zeros(tiny, report)) == sum(x.zeros for x in report.layers) == budget
    if isinstance(allocation, dict):
        for layer, n in zip(report.layers, sizes(report), strict=True):
            if "layers.0" in layer.name:
                assert layer.zeros == 3 * n // 10
            elif "q_proj" in layer.name:
                assert layer.zeros == 8 * n // 10


def test_an_allocation_that_cannot_meet_the_budget_is_an_error_and_leaves_the_model(
    tiny, token_ids
):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    with pytest.raises(ConfigError, match=r"between .* of the weights zero, sparsity asks for 0.5"):
        prune(tiny, batches(token_ids), allocation={"layers.0": 0.01, "layers.1": 0.02})
    with pytest.raises(TargetError, match="nothing_like_it"):
        prune(tiny, batches(token_ids), allocation={"nothing_like_it": 0.3})
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())


@every_recipe
def test_a_sparsity_of_zero_leaves_the_model(tiny, token_ids, method):
    before = tiny(token_ids).logits
    report = prune(tiny, batches(token_ids), method=method, sparsity=0.0)
    assert report.layers == ()
    assert torch.equal(tiny(token_ids).logits, before)


@every_recipe
@pytest.mark.parametrize("sparsity", [0.01, 0.95])
def test_extreme_sparsities_are_met(tiny, token_ids, method, sparsity):
    report = prune(tiny, batches(token_ids), method=method, sparsity=sparsity)
    expected = sum(math.floor(round(100 * sparsity) * n / 100) for n in sizes(report))
    assert sum(count_zeros(tiny, report)) == expected
    assert bool(torch.isfinite(tiny(token_ids).logits).all())


def test_rows_of_zeros_are_no_obstacle(tiny, token_ids):
    with torch.no_grad():
        tiny.model.layers[1].mlp.up_proj.weight[::2] = 0
        tiny.model.layers[0].self_attn.o_proj.weight[:3] = 0
    prune(tiny, batches(token_ids), method="best")
    assert bool(torch.isfinite(tiny(token_ids).logits).all())


@every_recipe
def test_a_recipe_is_the_settings_it_stands_for(tiny, token_ids, method):
    recipe = RECIPES[method]
    named, spelled = copies(tiny, 2)
    first = prune(named, batches(token_ids), method=method)
    second = prune(
        spelled,
        batches(token_ids),
        method=recipe.solver,
        refit=recipe.refit,
        target=recipe.target,
        metric=recipe.metric,
        allocation=recipe.allocation,
    )
    ours, theirs = weights_of(named, first), weights_of(spelled, second)
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


@every_recipe
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_recipe_s_checkpoint_reloads_to_the_same_bits(tiny, token_ids, tmp_path, method, pattern):
    tiny.save_pretrained(tmp_path / "dense")
    config = SparseConfig(method=method, pattern=pattern, dataset=batches(token_ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    assert again.config.quantization_config.method == method
    assert again.config.quantization_config.allocation == config.allocation


@every_recipe
def test_half_precision_is_pruned_too(tiny, token_ids, method):
    model = tiny.to(torch.bfloat16)
    report = prune(model, batches(token_ids), method=method)
    assert sum(count_zeros(model, report)) == sum(n // 2 for n in sizes(report))
    assert bool(torch.isfinite(model(token_ids).logits).all())


class Reference:
    """`target="dense"` by hand in fp64: magnitude masks, layer inputs by hooks, two whole models.

    Layer by layer in the order of a Llama's stages; all of a block's layers see the inputs of the
    block before any of them is pruned, as without stages.
    """

    def __init__(self, model) -> None:
        self.dense, self.pruned = (m.double() for m in copies(model, 2))

    def inputs(self, model, name, data) -> torch.Tensor:
        rows = []
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda m, args: rows.append(args[0].detach().flatten(0, 1))
        )
        with torch.no_grad():
            model(data)
        hook.remove()
        return rows[0]

    def stream(self, model, block, writer, data) -> torch.Tensor:
        """The residual stream to which a writer's output is added."""
        layer = model.model.layers[block]
        before, after = [], []
        hooks = [
            layer.register_forward_pre_hook(lambda m, args: before.append(args[0])),
            layer.self_attn.register_forward_hook(lambda m, args, out: after.append(out[0])),
        ]
        with torch.no_grad():
            model(data)
        for hook in hooks:
            hook.remove()
        x = before[0] + (after[0] if writer == "down_proj" else 0)
        return x.flatten(0, 1)

    def run(self, data) -> dict[str, torch.Tensor]:
        found = {}
        for block, layer in enumerate(self.pruned.model.layers):
            solved = {}
            for path, module in layer.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                name = f"model.layers.{block}.{path}"
                weight = self.dense.get_submodule(name).weight.detach()
                x, xd = (self.inputs(m, name, data) for m in (self.pruned, self.dense))
                wanted = xd @ weight.T
                writer = path.split(".")[-1]
                if writer in ("o_proj", "down_proj"):
                    wanted = wanted + (
                        self.stream(self.dense, block, writer, data)
                        - self.stream(self.pruned, block, writer, data)
                    )
                hessian = x.T @ x / len(x)
                lam = 0.01 * hessian.diagonal().mean()
                system = hessian + lam * torch.eye(len(hessian), dtype=torch.float64)
                right = x.T @ wanted / len(x) + lam * weight.T
                target = torch.linalg.solve(system, right).T
                gone = target.abs().flatten().argsort()[: target.numel() // 2]
                solved[name] = target.flatten().index_fill(0, gone, 0).view_as(target)
            for name, weight in solved.items():
                self.pruned.get_submodule(name).weight.data = weight
                found[name] = weight
        return found


def test_dense_targets_are_those_of_an_independent_computation(tiny, token_ids):
    expected = Reference(tiny).run(token_ids)
    report = prune(tiny, list(token_ids), method="magnitude", target="dense", stages=False)
    assert [layer.name for layer in report.layers] == list(expected)
    for name, weight in expected.items():
        found = tiny.get_submodule(name).weight.double()
        scale = float(weight.abs().max())
        same = (found != 0) == (weight != 0)
        assert same.double().mean() > 0.995  # near ties may fall either way
        torch.testing.assert_close(found[same], weight[same], rtol=1e-3, atol=1e-3 * scale)


def test_with_nothing_pruned_before_it_the_first_block_s_targets_are_its_weights(tiny, token_ids):
    dense, layer = copies(tiny, 2)
    settings = {"method": "magnitude", "targets": ["layers.0"]}
    first = prune(dense, list(token_ids), target="dense", stages=False, **settings)
    second = prune(layer, list(token_ids), target="layer", **settings)
    ours, theirs = weights_of(dense, first), weights_of(layer, second)
    for name, weight in ours.items():
        same = (weight == 0) == (theirs[name] == 0)
        assert same.double().mean() > 0.99  # near ties may fall either way
        torch.testing.assert_close(weight[same], theirs[name][same], rtol=1e-3, atol=1e-5)


def test_dense_targets_bring_the_last_block_s_output_closer_to_the_dense_model_s(tiny, token_ids):
    with torch.no_grad():
        goal = tiny.model(token_ids).last_hidden_state
    losses = []
    for model, target in zip(copies(tiny, 2), ("layer", "dense"), strict=True):
        prune(model, list(token_ids), method="fast", target=target, sparsity=0.7, stages=True)
        with torch.no_grad():
            losses.append(float((model.model(token_ids).last_hidden_state - goal).norm()))
    assert losses[1] < 0.97 * losses[0]


@every_recipe_in_stages
def test_padding_changes_nothing(tiny, token_ids, method, stages):
    ids = batches(token_ids)
    if RECIPES[method].metric == "fisher":
        # Labels are drawn for padding, too: the metric would be of another draw.
        arguments = {"metric": "inputs", "allocation": "uniform"}
    else:
        arguments = {}
    padded = []
    for i, row in enumerate(ids):
        mask = torch.ones(20, dtype=torch.long)
        mask[16:] = 0
        extra = torch.full((4,), 7 + i % 3)
        padded.append({"input_ids": torch.cat([row, extra])[None], "attention_mask": mask[None]})
    models = copies(tiny, 2)
    plain = prune(models[0], ids, method=method, stages=stages, **arguments)
    other = prune(models[1], padded, method=method, stages=stages, **arguments)
    # Sums over longer batches are rounded otherwise. A near tie that falls the other way changes
    # the inputs of all layers behind it: their masks may differ, what the pruning costs may not.
    for first, second in zip(plain.layers, other.layers, strict=True):
        assert second.tokens == first.tokens == sum(map(len, ids))
        assert second.relative_error == pytest.approx(first.relative_error, rel=0.05)
    ours, theirs = weights_of(models[0], plain), weights_of(models[1], other)
    for name in (f"model.layers.0.self_attn.{x}_proj" for x in "qkv"):  # nothing lies before them
        rows = ((ours[name] == 0) == (theirs[name] == 0)).all(dim=1)
        assert rows.double().mean() > 0.8
        torch.testing.assert_close(ours[name][rows], theirs[name][rows], rtol=0.02, atol=1e-3)


@every_recipe
def test_stages_prune_every_layer_to_its_count(tiny, token_ids, method):
    report = prune(tiny, batches(token_ids), method=method, stages=True)
    assert sum(count_zeros(tiny, report)) == sum(n // 2 for n in sizes(report))
    order = [layer.name.split(".")[-1] for layer in report.layers][:7]
    assert order[3] == "o_proj"
    assert order[6] == "down_proj"


@every_recipe_in_stages
def test_an_encoder_with_post_norm_is_pruned(token_ids, method, stages):
    models = [
        tiny_bert(BertModel),
        tiny_bert(BertForSequenceClassification, num_labels=3),
        tiny_bert(BertForSequenceClassification, num_labels=1),
    ]
    for model in models:
        report = prune(model, batches(token_ids), method=method, stages=stages)
        assert len(report.layers) >= 13
        assert sum(count_zeros(model, report)) == sum(n // 2 for n in sizes(report))


@every_recipe_in_stages
def test_an_encoder_decoder_is_pruned(token_ids, method, stages):
    model = tiny_t5()
    ids = token_ids.repeat(2, 1)[:16]
    data = [
        {"input_ids": row[None], "decoder_input_ids": other[None, :9]}
        for row, other in zip(ids, ids.flip(0), strict=True)
    ]
    report = prune(model, data, method=method, stages=stages)
    assert len(report.layers) == 2 * 5 + 2 * 9  # T5 keeps every wo in fp32: dense
    assert sum(count_zeros(model, report)) == sum(n // 2 for n in sizes(report))


@every_recipe_in_stages
def test_an_offloaded_model_gets_the_same_weights(tiny, token_ids, method, stages):
    plain, offloaded = copies(tiny, 2)
    cpu_offload(offloaded, torch.device("cpu"))
    first = prune(plain, batches(token_ids), method=method, stages=stages)
    second = prune(offloaded, batches(token_ids), method=method, stages=stages)
    assert [x.zeros for x in first.layers] == [x.zeros for x in second.layers]
    expected = weights_of(plain, first)
    for name, weight in expected.items():
        layer = offloaded.get_submodule(name)
        with align_module_device(layer):
            assert torch.equal(layer.weight, weight)
    # Offloaded layers multiply by other kernels.
    torch.testing.assert_close(offloaded(token_ids).logits, plain(token_ids).logits)


class Router(nn.Module):
    """Sends a batch through one of two blocks, by what the block before has made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.first = nn.ModuleList([nn.Linear(8, 8)])
        self.either = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.dense_sum: dict[int, float] = {}

    def forward(self, input_ids):
        x = self.first[0](self.embed(input_ids))
        key = int(input_ids.sum())
        # Batches trade places as soon as the first block is pruned; both blocks keep their number.
        swapped = abs(float(x.sum()) - self.dense_sum.setdefault(key, float(x.sum()))) > 1e-6
        odd = bool(input_ids[0, 0] % 2) != swapped
        return self.either[int(odd)](x)


def test_dense_targets_of_units_that_other_batches_reach_are_an_error(token_ids):
    torch.manual_seed(0)
    model = Router().eval()
    data = [{"input_ids": row[None]} for row in token_ids[:2].clone()]
    data[0]["input_ids"][0, 0], data[1]["input_ids"][0, 0] = 4, 5
    with torch.no_grad():
        for batch in data:
            model(**batch)
    with pytest.raises(CalibrationError, match="other batches in the dense than in the pruned"):
        prune(model, data, method="wanda", target="dense")


def test_a_layer_without_gradient_is_refitted_by_its_inputs_and_the_report_says_so(tiny, token_ids):
    tiny.model.layers[0].mlp.register_forward_hook(lambda m, args, out: out.detach())
    report = prune(tiny, batches(token_ids), method="best")
    for layer in report.layers:
        noted = any("no gradient of the sampled batches reached it" in n for n in layer.notes)
        assert noted == ("layers.0.mlp" in layer.name)
    assert sum(count_zeros(tiny, report)) == sum(n // 2 for n in sizes(report))


def test_weights_that_are_not_finite_are_named_before_anything_is_measured(tiny, token_ids):
    tiny.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SolveError, match=r"layer model\.layers\.1\.mlp\.up_proj"):
        prune(tiny, batches(token_ids), method="best")


def test_statistics_and_inputs_of_a_unit_are_gone_when_the_next_one_is_reached(
    tiny: LlamaForCausalLM, token_ids, monkeypatch
):
    import weakref

    from hf_sparse.calibration import block_walk
    from hf_sparse.core.statistics import Statistics

    alive: list[weakref.ref] = []
    seen: list[int] = []

    class Watched(block_walk.Visit):
        def __init__(self, *args, **kwargs) -> None:
            seen.append(sum(ref() is not None for ref in alive))
            super().__init__(*args, **kwargs)
            alive.append(weakref.ref(self))

    original = Statistics.inverse_factor  # best needs it for costs and for targets

    def watched(self, damping):
        alive.append(weakref.ref(self))
        return original(self, damping)

    monkeypatch.setattr(block_walk, "Visit", Watched)
    monkeypatch.setattr(Statistics, "inverse_factor", watched)
    prune(tiny, batches(token_ids), method="best")
    assert seen == [0, 0, 0, 0]  # two blocks, for the allocation and for the pruning
