"""Generation compiles around the operator of a GPU kernel; on a CPU it decodes the weight."""

import pytest
import torch
from transformers.generation.configuration_utils import CompileConfig

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.kernels import Verdict, devices, sliced, t16
from hf_sparse.kernels.base import Considered
from hf_sparse.layers import SparseLinear


@pytest.mark.filterwarnings("ignore")
def test_a_static_cache_and_no_break(tiny, monkeypatch):
    refused = Considered(Verdict("t16", False, "not here"))
    monkeypatch.setattr(t16.T16Kernel, "consider", classmethod(lambda cls, stored: refused))
    monkeypatch.setattr(sliced.SlicedKernel, "_obstacle", staticmethod(lambda stored: None))
    monkeypatch.setattr(devices, "gpu", lambda: "NVIDIA Made Up")
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    layers = [module for module in tiny.modules() if isinstance(module, SparseLinear)]
    assert {layer.kernel.name for layer in layers} == {"sliced"}
    prompt = torch.randint(3, 61, (1, 8), generator=torch.Generator().manual_seed(0))
    arguments = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": -1}
    eager = tiny.generate(prompt, **arguments, max_new_tokens=6)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # else only on GPUs
    arguments |= {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(tiny.generate(prompt, **arguments, max_new_tokens=6), eager)
    assert hasattr(tiny, "_compiled_call")
