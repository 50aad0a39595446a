"""A size is what was written, or an error."""

import shutil
from functools import partial

import pytest
from tiny_models import tiny_llama

import hf_sparse
from hf_sparse import ConfigError, SparseConfig, convert, export_dense
from hf_sparse.core.sizes import read_size

SIZES = [
    (5, 5),
    ("5", 5),
    ("5B", 5),
    ("1.5KB", 1500),
    ("3GB", 3 * 1000**3),
    ("3 gb", 3 * 1000**3),
    ("3gB", 3 * 1000**3),
    (" 3GiB ", 3 * 1024**3),
    ("0.5gib", 1024**3 // 2),
    ("2TB", 2 * 1000**4),
    ("7MIB", 7 * 1024**2),
]
NONE = ["3Gb", "3Gib", "500Mb", "3G", "much", "", "-1GB", -1, 0, "0GB", True, 2.5, None, "nanGB"]
NONE += ["1e3GB", "3GB!", "٣GB", "infGB"]


def test_sizes_are_bytes_whatever_the_case():
    for text, expected in SIZES:
        assert read_size("max_memory", text) == expected, text


def test_what_could_mean_bits_and_what_is_no_size_is_refused():
    for size in NONE:
        with pytest.raises(ConfigError, match=r"max_memory=.* is no size: pass bytes"):
            read_size("max_memory", size)


def test_what_writes_files_reads_sizes_so(tmp_path):
    model = tiny_llama()
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    for write in (model.save_pretrained, partial(export_dense, model)):
        with pytest.raises(ConfigError, match="max_shard_size='5Gb' is no size"):
            write(tmp_path / "out", max_shard_size="5Gb")
        assert not (tmp_path / "out").exists()
        write(tmp_path / "out", max_shard_size="8kib")
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        shutil.rmtree(tmp_path / "out")
    for refused in (partial(model.push_to_hub, "me/model"), partial(convert, "old", "new")):
        with pytest.raises(ConfigError, match="max_shard_size='5Gb' is no size"):
            refused(max_shard_size="5Gb")
