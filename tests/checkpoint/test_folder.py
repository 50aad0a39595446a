"""What a new checkpoint replaces of an older one in the same place."""

import pytest

from hf_sparse.checkpoint.folder import stale_files

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
WHOLE, REPORT = "model.safetensors", "pruning_report.json"


@pytest.mark.parametrize(
    ("new", "held", "stale"),
    [
        ([WHOLE], [*SHARDS, INDEX, "config.json"], [*SHARDS, INDEX]),
        ([*SHARDS, INDEX], [WHOLE, "notes.txt"], [WHOLE]),
        ([WHOLE], [WHOLE, REPORT], [REPORT]),
        ([WHOLE], ["adapter_model.safetensors", "model.py"], []),
        (["adapter_model.safetensors", "README.md"], [WHOLE], []),
    ],
)
def test_files_of_an_earlier_checkpoint_are_stale(new, held, stale):
    assert stale_files(new, held) == stale
