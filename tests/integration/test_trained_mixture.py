"""A tiny mixture whose experts matter: what pruning them costs, by method."""

import sys

import pytest
import torch

import hf_sparse
from conftest import FIXTURES, ROOT
from hf_sparse.layers import SparseExperts

sys.path.insert(0, str(ROOT / "tests" / "data"))
import make_mixture as mixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FIXTURES.exists(), reason="needs the fixtures folder"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and the perplexity of the model that the script trains."""
    folder, model = tmp_path_factory.mktemp("mixture"), mixture.train()
    model.save_pretrained(folder)
    return folder, mixture.perplexity(model)


@pytest.mark.parametrize("targets", [None, ["experts"]], ids=["all", "experts"])
def test_sparsegpt_beats_wanda_beats_magnitude_in_perplexity(trained, targets):
    folder, dense = trained
    found = {}
    for method in mixture.METHODS:
        model = mixture.pruned(folder, method, targets=targets)
        layers = [x for x in model.hf_quantizer.report.layers if "experts" in x.name]
        assert len(layers) == 2 * 4 * 2
        assert {layer.sparsity for layer in layers} == {0.5}
        found[method] = mixture.perplexity(model)
    assert dense < found["sparsegpt"] < found["wanda"] < found["magnitude"]
    # What the experts cost isn't lost in what the attention costs.
    assert found["magnitude"] > 1.03 * dense


def test_its_experts_take_at_most_057_of_dense_bf16(trained):
    folder, _ = trained
    model = mixture.pruned(folder, "sparsegpt", dtype=torch.bfloat16)
    layers = [x for x in hf_sparse.explain(model).layers if "experts" in x.name]
    dense = sum(layer.bytes_dense for layer in layers)
    assert dense == 2 * 2 * 4 * 3 * 128 * 192
    held = sum(
        tensor.nbytes
        for experts in model.modules()
        if isinstance(experts, SparseExperts)
        for tensor in (*experts.parameters(), *experts.buffers())
    )
    assert held <= 0.57 * dense


def test_a_quarter_of_its_experts_goes_best_by_what_the_output_loses(trained):
    """Of the other scores, and of three draws."""
    folder, dense = trained
    found = {}
    for score in ("reap", "frequency", "norm", 0, 1, 2):
        model = mixture.with_fewer(folder, 0.25, score)
        assert model.config.num_local_experts == 3
        found[score] = mixture.perplexity(model)
    assert dense < found.pop("reap") < min(found.values())


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_what_all_tokens_lose_chooses_experts_as_well_as_what_each_of_them_loses(trained, share):
    folder, _ = trained
    reap, contribution = (
        mixture.perplexity(mixture.with_fewer(folder, share, score))
        for score in ("reap", "contribution")
    )
    assert contribution <= reap
