"""A sparse checkpoint in a transformers that knows nothing of hf_sparse: an error, never random
weights."""

import json

import fresh
import pytest

import hf_sparse
from hf_sparse import SparseConfig

LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, pipeline

found = []
for ways in ({}, {"ignore_mismatched_sizes": True}, {"dtype": "bfloat16"}):
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], **ways)
        found.append("loaded")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
assert "hf_sparse" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.parametrize(("pattern", "shards"), [("unstructured", "20KB"), ("2:4", "5GB")])
def test_it_is_an_error_that_names_the_package_whatever_is_ignored(tiny, tmp_path, pattern, shards):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", pattern=pattern))
    tiny.save_pretrained(tmp_path, max_shard_size=shards)
    done = fresh.run(LOAD, tmp_path)
    assert done.returncode == 0, done.stderr
    for said in json.loads(done.stdout):
        assert "import-hf_sparse-first.safetensors" in said
        assert "ignore_mismatched_sizes" not in said


def test_it_loads_with_hf_sparse_and_is_dense_again_without_a_trace(tiny, tmp_path, token_ids):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.75))
    tiny.save_pretrained(tmp_path / "sparse")
    loaded = type(tiny).from_pretrained(tmp_path / "sparse")
    assert loaded(token_ids).logits.equal(tiny(token_ids).logits)
    assert not hasattr(loaded.config, "transformers_weights")
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in (tmp_path / "dense" / "config.json").read_text()
