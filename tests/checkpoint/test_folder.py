"""What a new checkpoint replaces of an older one in the same place."""

import json

import pytest

from hf_sparse.checkpoint.commit import stale_files

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
WHOLE, REPORT = "model.safetensors", "pruning_report.json"
OTHERS = ["model.fp16.safetensors", "model_optimizer_state.safetensors", "model.py", "notes.txt"]


def stale(new, held, named=SHARDS, folder=None):
    def fetch(name):
        assert name in held
        path = folder / name
        path.write_text(json.dumps({"weight_map": {str(i): n for i, n in enumerate(named)}}))
        return path

    return stale_files(new, held, fetch)


@pytest.mark.parametrize(
    ("new", "held", "expected"),
    [
        ([WHOLE], [*SHARDS, INDEX, "config.json"], [*SHARDS, INDEX]),
        ([*SHARDS, INDEX], [WHOLE, *OTHERS], [WHOLE]),
        ([WHOLE], [WHOLE, REPORT, *OTHERS], [REPORT]),
        ([WHOLE], ["adapter_model.safetensors"], []),
        ([WHOLE], SHARDS, []),  # no index names them
        (["adapter_model.safetensors", "README.md"], [WHOLE, INDEX, REPORT], []),
        ([REPORT], [WHOLE], []),
        ([], [WHOLE, *SHARDS, INDEX], []),
        (["model.ema.safetensors"], ["model.safetensors.index.ema.json", WHOLE, *SHARDS, INDEX],
         ["model.safetensors.index.ema.json"]),
    ],
)  # fmt: skip
def test_only_what_the_replaced_checkpoint_names_is_stale(new, held, expected, tmp_path):
    assert stale(new, held, folder=tmp_path) == expected


def test_an_index_can_not_name_other_files_as_its_shards(tmp_path):
    named = [*OTHERS, "../model-00001-of-00002.safetensors", "adapter_model.safetensors", SHARDS[0]]
    held = [*named, INDEX, SHARDS[1]]
    assert stale([WHOLE], held, named, tmp_path) == [SHARDS[0], INDEX]


def test_a_damaged_index_names_nothing(tmp_path):
    (tmp_path / INDEX).write_text("[" * 100_000)
    held = [INDEX, *SHARDS]
    assert stale_files([WHOLE], held, lambda name: tmp_path / name) == [INDEX]
