"""`generate` with a static cache and compiled steps: one graph, and the tokens of the eager model.

transformers compiles by itself on GPUs; here it is told to do so on the CPU. Every product is an
operator there, so that the graph is the same whatever computes it.
"""

import pytest
import torch
from tiny_models import tiny_llama
from transformers import CompileConfig

import hf_sparse
from hf_sparse import SparseConfig, SparseLinear
from hf_sparse.kernels import Stored
from hf_sparse.kernels.gpu.kernel import SlicedKernel


def as_chosen(layer):
    return layer.kernel


def sliced(layer):
    stored = Stored(layer.format, layer.packed, layer.shape, layer.weight_dtype)
    return SlicedKernel.of(stored)


CODES = {"bits": 4, "group_size": 8}


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [
        ({}, as_chosen),
        pytest.param(
            {"pattern": "2:4"}, as_chosen, marks=pytest.mark.slow
        ),  # it packs values alike
        ({"low_rank": 2}, as_chosen),
        (CODES, as_chosen),
        ({}, sliced),
        pytest.param({"pattern": "2:4"}, sliced, marks=pytest.mark.slow),  # likewise
        pytest.param({"low_rank": 2}, sliced, marks=pytest.mark.slow),  # the part is the layer's
        (CODES, sliced),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_step_is_one_graph(token_ids, recipe, kernel):
    tiny = tiny_llama(num_hidden_layers=1)
    data = {} if "low_rank" not in recipe else {"method": "sparsegpt", "dataset": list(token_ids)}
    hf_sparse.prune(tiny, SparseConfig(**{"method": "magnitude", **recipe, **data}))
    layers = [module for module in tiny.modules() if isinstance(module, SparseLinear)]
    for layer in layers:
        layer.use(kernel(layer))
    prompt = token_ids[:2, :5]
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "min_new_tokens": 6,
        "max_new_tokens": 6,
    }
    eager = tiny.generate(prompt, **arguments)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    everywhere = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    everywhere._compile_all_devices = True
    compiled = tiny.generate(
        prompt, **arguments, cache_implementation="static", compile_config=everywhere
    )
    assert torch.equal(compiled, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
