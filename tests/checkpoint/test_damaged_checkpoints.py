"""Files damaged at random: taken if docs/format.md allows them, else refused with a sentence.

A longer run, which prints the outcomes:

    HF_SPARSE_DAMAGED=20000 python -m pytest -s -n0 tests/checkpoint/test_damaged_checkpoints.py
"""

import copy
import json
import os
from collections import Counter

import pytest
import torch
from format_oracle import SIZES, is_valid, read_file, write_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hf_sparse import CheckpointError
from hf_sparse.checkpoint.headers import PackedLayer, metadata, read_layers
from hf_sparse.core.grids import Grid
from hf_sparse.core.low_rank import KEY_A, KEY_B, LowRank
from hf_sparse.core.patterns import NM
from hf_sparse.formats import FORMATS, Quantized
from hf_sparse.layers.axes import Axes

MOST = int(os.environ.get("HF_SPARSE_DAMAGED", "200"))
OUTCOMES = Counter()


def sound_file():
    """A file with a layer in each format, one with a low-rank part."""
    layers, tensors = [], {}
    generator = torch.Generator().manual_seed(0)
    pattern = NM(2, 4)
    for number, (name, grid, dtype) in enumerate(
        [
            ("bitmask", None, torch.float32),
            ("n:m", None, torch.bfloat16),
            ("bitmask", Grid(4, 4, False), torch.float32),
            ("n:m", Grid(8, None, True), torch.float32),
            ("dense", Grid(3, 5, True), torch.float32),
        ]
    ):
        weight = torch.randn(3, 11, generator=generator)
        weight = weight.where(pattern.mask(weight.abs()), 0).to(dtype)
        coded = grid and grid.fit(weight).round(weight)
        layout = FORMATS[name].fits(coded.codes if coded else weight, pattern).format
        fmt = Quantized(grid, layout) if grid else layout
        packed = fmt.pack(coded if coded else weight)
        rank = 2 if number == 1 else 0
        if rank:
            packed |= {KEY_A: torch.randn(2, 11), KEY_B: torch.randn(3, 2)}
        layers.append(PackedLayer(f"layer{number}", fmt, (3, 11), Axes(), rank))
        tensors |= {f"layer{number}.{key}": tensor for key, tensor in packed.items()}
    return save(tensors, metadata(layers))


SOUND = read_file(sound_file())
CONTENT = json.loads(SOUND[0]["hf_sparse"])
ODD = [None, True, False, -1, 0, 1, 2, 3, 4, 5, 8, 16, 33, 2**31, 0.5, "", "n:m", "bitmask", [], {}]
KEYS = ["format", "shape", "n", "m", "bits", "group_size", "sym", "layout", "low_rank", "spatial"]


def damage_tensor(draw, tensors):
    key = draw(st.sampled_from(sorted(tensors)))
    dtype, shape, data = tensors[key]
    kind = draw(st.sampled_from(["bit", "byte", "drop", "dtype", "shape", "length", "name"]))
    if kind in ("bit", "byte") and data:
        place = draw(st.integers(0, len(data) - 1))
        value = (
            data[place] ^ 1 << draw(st.integers(0, 7))
            if kind == "bit"
            else draw(st.integers(0, 255))
        )
        data = data[:place] + bytes([value]) + data[place + 1 :]
    elif kind == "drop":
        del tensors[key]
        return
    elif kind == "dtype":
        same = [other for other in SIZES if SIZES[other] == SIZES[dtype]]
        dtype = draw(st.sampled_from(same))
    elif kind == "shape":
        shape = draw(st.sampled_from([shape[::-1], [*shape, 1], [1, *shape]]))
    elif kind == "length" and len(shape) == 1:
        count = draw(st.integers(0, shape[0] + 2))
        data, shape = (data + bytes(64))[: count * SIZES[dtype]], [count]
    elif kind == "name":
        del tensors[key]
        key = draw(st.sampled_from([key + "s", key.replace("layer", "other")]))
    tensors[key] = (dtype, shape, data)


def damage_entry(draw, layers):
    entry = layers[draw(st.sampled_from(sorted(layers)))]
    if isinstance(entry.get("layout"), dict) and draw(st.booleans()):
        entry = entry["layout"]
    key = draw(st.sampled_from([*KEYS, *entry]))
    if draw(st.integers(0, 5)) == 0:
        entry.pop(key, None)
    elif key == "shape":
        entry[key] = [draw(st.sampled_from([3, 11, *ODD])), draw(st.sampled_from([3, 11, *ODD]))]
    else:
        entry[key] = draw(st.sampled_from(ODD))


@st.composite
def damaged(draw):
    tensors, content = dict(SOUND[1]), copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 2)):
            damage_tensor(draw, tensors)
        else:
            damage_entry(draw, content["layers"])
    return {"hf_sparse": json.dumps(content)}, tensors


def load(path):
    """Everything that is checked of a file before a weight is computed."""
    for layer in read_layers([path]).values():
        tensors = {key: layer.read(key) for key in layer.layout}
        low_rank = LowRank(tensors.pop(KEY_B), tensors.pop(KEY_A)) if layer.low_rank else None
        layer.check(tensors, low_rank)
        dense = layer.format.unpack(tensors, layer.shape, torch.float32)
        assert dense.shape == layer.shape


def judge(path, said, tensors):
    path.write_bytes(write_file(said, tensors))
    valid = is_valid(said, tensors)
    OUTCOMES["valid, taken" if valid else "invalid, refused"] += 1
    if valid:
        load(path)
    else:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: |the checkpoint: "):
            load(path)


def test_a_sound_file_is_taken(tmp_path):
    judge(tmp_path / "model.safetensors", *SOUND)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    yield tmp_path_factory.mktemp("damaged") / "model.safetensors"
    print(f"\ndamaged files: {dict(OUTCOMES)}")  # noqa: T201 - what a long run is for


@settings(
    max_examples=MOST,
    deadline=None,
    derandomize=MOST <= 200,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(damaged())
def test_a_damaged_file_is_taken_or_refused_as_the_format_says(path, file):
    judge(path, *file)
