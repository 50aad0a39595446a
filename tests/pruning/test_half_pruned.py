"""A run that breaks off leaves a model that says so and refuses what it can't do any more."""

import copy
import pickle

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import ConfigError, SparseConfig
from hf_sparse.core.errors import HfSparseError, SaveError, SolveError


@pytest.fixture
def broken(tiny):
    """Its second block gives NaN."""
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    return model


def config(token_ids, **arguments):
    return SparseConfig(dataset=[{"input_ids": token_ids}], **arguments)


@pytest.mark.parametrize("target", ["layer", "dense"])
def test_a_half_pruned_model_is_neither_saved_run_nor_pruned(broken, token_ids, tmp_path, target):
    with pytest.raises(HfSparseError):
        hf_sparse.prune(broken, config(token_ids, target=target))
    assert isinstance(broken.model.layers[0].mlp.up_proj, hf_sparse.SparseLinear)
    for model in (broken, copy.deepcopy(broken), pickle.loads(pickle.dumps(broken))):
        with pytest.raises(SaveError, match=r"1 of 2 blocks were done \(model\.layers\.0\).*anew"):
            model.save_pretrained(tmp_path / "out")
        with pytest.raises(SolveError, match="half pruned"):
            model.generate(token_ids[:, :4])
        with pytest.raises(SolveError, match="half pruned"):
            model(token_ids)
        with pytest.raises(ConfigError, match="half pruned"):
            hf_sparse.prune(model, config(token_ids))
    assert not (tmp_path / "out").exists()


def test_the_error_says_which_blocks_are_done(broken, token_ids):
    with pytest.raises(SolveError, match=r"layers\.1\.mlp.*; pruning broke off when 1 of 2 blocks"):
        hf_sparse.prune(broken, config(token_ids))


def test_an_interrupt_says_so_too_and_leaves_no_hook(tiny, token_ids):
    model = copy.deepcopy(tiny)

    def interrupt(*_):
        if isinstance(model.model.layers[0].mlp.up_proj, hf_sparse.SparseLinear):
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 blocks were done"):
        hf_sparse.prune(model, config(token_ids))
    handle.remove()
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "place", ["run.PruningReport", "run.log_to_current_run", "prune.speed_up_head"]
)
def test_an_interrupt_behind_the_last_block_leaves_no_model_that_saves_without_its_config(
    tiny, token_ids, tmp_path, monkeypatch, place
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = copy.deepcopy(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(f"hf_sparse.pruning.{place}", interrupt)
        with pytest.raises(KeyboardInterrupt, match="2 of 2 blocks were done"):
            hf_sparse.prune(model, config(token_ids))
    with pytest.raises(SaveError, match="half pruned"):
        model.save_pretrained(tmp_path / "out")


def test_what_is_inside_a_half_pruned_model_is_refused_as_well(broken, token_ids, tmp_path):
    with pytest.raises(HfSparseError):
        hf_sparse.prune(torch.nn.DataParallel(broken), config(token_ids))
    with pytest.raises(SaveError, match="1 of 2 blocks"):
        broken.model.save_pretrained(tmp_path / "out")
    with pytest.raises(SolveError, match="half pruned"):
        broken.model(token_ids)
    with pytest.raises(ConfigError, match="half pruned"):
        hf_sparse.prune(broken.model, config(token_ids))


def test_an_error_with_a_message_of_its_own_making_gets_a_note(tiny, token_ids, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_sparse.pruning.prune.speed_up_head", full)
    with pytest.raises(OSError, match="No space left") as caught:
        hf_sparse.prune(copy.deepcopy(tiny), config(token_ids))
    assert caught.value.errno == 28
    assert "2 of 2 blocks were done" in caught.value.__notes__[0]


def test_an_error_before_the_first_layer_is_written_leaves_the_model_as_it_was(tiny, token_ids):
    model = copy.deepcopy(tiny)
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(HfSparseError, match="division by zero"):
        hf_sparse.prune(model, config(token_ids))
    model.model.layers[0].self_attn._forward_hooks.clear()
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert hf_sparse.prune(model, config(token_ids)).layers


def test_a_plain_module_is_marked_as_well():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    with pytest.raises(HfSparseError):
        hf_sparse.prune(model, SparseConfig(dataset=[{"input": torch.ones(2, 4) * 1e30}]))
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("kind", ["meta", "float8", "integer"])
def test_weights_that_cannot_be_pruned_are_named_before_the_work(tiny, kind):
    model = copy.deepcopy(tiny)
    if kind == "meta":
        model = model.to("meta")
    else:
        dtype = torch.float8_e4m3fn if kind == "float8" else torch.int8
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    name = "layers.0.self_attn.q_proj is on the meta" if kind == "meta" else "layers.1.mlp.up_proj"
    with pytest.raises(ConfigError, match=name):
        hf_sparse.prune(model, SparseConfig(method="magnitude"))
    assert not any(isinstance(m, hf_sparse.SparseLinear) for m in model.modules())
