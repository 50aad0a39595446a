"""Old compressed-tensors files, tampered with: the error names the file and the tensor."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from hf_sparse import CheckpointError, convert
from hf_sparse.checkpoint.compressed_tensors.files import read_parameters
from hf_sparse.checkpoint.compressed_tensors.parameters import BITMASK, BITMASK_24
from hf_sparse.checkpoint.weight_files import weight_files

DATA = ROOT / "tests" / "data"
STEM = "model.layers.0.mlp.up_proj"
SOURCES = {BITMASK: ("bitmask-0.8.1", f"{STEM}.weight"), BITMASK_24: ("24-0.14.0.1", STEM)}


def read(folder, structure):
    return {p.names[0]: p.dense() for p in read_parameters(weight_files(folder), structure)}


def edited(tmp_path, structure, change):
    """A copy of a checkpoint, with the parts of one weight changed."""
    folder, stem = SOURCES[structure]
    tensors = load_file(DATA / folder / "model.safetensors")
    parts = {key.rpartition(".")[2]: v for key, v in tensors.items() if key.startswith(stem + ".")}
    others = {key: value for key, value in tensors.items() if not key.startswith(stem + ".")}
    change(parts)
    changed = {f"{stem}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(others | changed, tmp_path / "model.safetensors")
    return tmp_path


def flip(bit, row=0, byte=0):
    def change(parts):
        parts["bitmask"][row, byte] ^= 1 << bit

    return change


def put(part, value):
    return lambda parts: parts.update({part: value})


def drop(part):
    return lambda parts: parts.pop(part)


def swap_kept(parts):
    """In a group of four, one more, and in the next, one fewer: the number is right."""
    first = parts["bitmask"][0, 0].item()
    more = next(bit for bit in range(4) if not first >> bit & 1)
    fewer = next(bit for bit in range(4, 8) if first >> bit & 1)
    parts["bitmask"][0, 0] = first ^ (1 << more) ^ (1 << fewer)


def move_kept(parts):
    """A bit moves to another row: the number is right, the offsets are not."""
    rows, values = parts["bitmask"], torch.tensor([1], dtype=torch.uint8)
    given = next(i for i, row in enumerate(rows.tolist()) if i and row[0] & 1)
    taken = next(i for i, row in enumerate(rows.tolist()) if i != given and not row[0] & 1)
    rows[given, 0] ^= values[0]
    rows[taken, 0] ^= values[0]


@pytest.mark.parametrize("structure", SOURCES)
def test_an_untouched_copy_reads_as_what_was_put_in(structure, tmp_path):
    folder = edited(tmp_path, structure, lambda parts: None)
    source, stem = SOURCES[structure]
    expected = load_file(DATA / source / "dense.safetensors")[f"{STEM}.weight"]
    assert torch.equal(read(folder, structure)[stem], expected)


@pytest.mark.parametrize(
    ("structure", "change", "words"),
    [
        (BITMASK, flip(0), r"bitmask marks \d+ kept weights, but \S+compressed holds \d+"),
        (BITMASK, flip(7, byte=1), "bitmask has bits set behind column 12"),
        (BITMASK, move_kept, "row_offsets doesn't count what"),
        (BITMASK, put("row_offsets", torch.arange(13)), "row_offsets doesn't count what"),
        (BITMASK, put("row_offsets", torch.zeros(14).long()), r"row_offsets is I64 of shape \(14"),
        (BITMASK, put("row_offsets", torch.zeros(13)), "row_offsets is F32"),
        (BITMASK, drop("row_offsets"), r"is there, but \S+row_offsets is missing"),
        (BITMASK, drop("compressed"), r"is there, but \S+compressed is missing"),
        (BITMASK, put("compressed", torch.ones(3)), "but .*compressed holds 3"),
        (BITMASK, put("compressed", torch.ones(3, 2)), r"compressed is F32 of shape \(3, 2\)"),
        (BITMASK, put("compressed", torch.tensor(1.0)), r"compressed is F32 of shape \(\)"),
        (BITMASK, put("compressed", torch.ones(3).char()), "compressed is I8: quantised"),
        (BITMASK, put("shape", torch.tensor([13, 2**40])), "shape holds .* sides of 1 to"),
        (BITMASK, put("shape", torch.tensor([13, -12])), "shape holds .* sides of 1 to"),
        (BITMASK, put("shape", torch.tensor([13, 0])), "shape holds .* sides of 1 to"),
        (BITMASK, put("shape", torch.tensor([12, 13])), r"bitmask is U8 of shape \(13, 2\)"),
        (BITMASK, put("shape", torch.tensor([13.0, 12.0])), "shape is F32"),
        (BITMASK, put("shape", torch.tensor(13)), r"shape has shape \(\)"),
        (BITMASK, put("shape", torch.ones(9).long()), r"shape has shape \(9,\)"),
        (BITMASK, put("bitmask", torch.ones(13, 2)), "bitmask is F32"),
        (BITMASK_24, flip(0), r"bitmask marks \d+ kept weights"),
        (BITMASK_24, swap_kept, "bitmask doesn't keep 2 of every 4 weights"),
        (BITMASK_24, flip(7, byte=1), "bitmask has bits set behind column 12"),
        (BITMASK_24, drop("shape"), r"is there, but \S+shape is missing"),
        (BITMASK_24, put("row_offsets", torch.zeros(14).long()), "row_offsets doesn't belong to"),
        (BITMASK_24, put("shape", torch.tensor([14, 12])), r"shape is I64 of shape \(2,\)"),
        (BITMASK_24, put("shape", torch.tensor([[14], [11]])), r"compressed is BF16 of shape \(14"),
        (BITMASK_24, put("compressed", torch.ones(84)), r"compressed is F32 of shape \(84,\)"),
    ],
)
def test_what_was_tampered_with_is_named(structure, change, words, tmp_path):
    folder = edited(tmp_path, structure, change)
    with pytest.raises(CheckpointError, match=words) as raised:
        read(folder, structure)
    path = re.escape(str(folder / "model.safetensors"))
    assert re.match(rf"{path}: {re.escape(SOURCES[structure][1])}\.\w+ ", str(raised.value))


def test_a_number_of_weights_that_fours_do_not_divide_is_refused(tmp_path):
    def change(parts):
        parts |= {
            "shape": torch.tensor([[3], [2]]),
            "compressed": torch.ones(3, 1),
            "bitmask": torch.ones(3, 1, dtype=torch.uint8),
        }

    with pytest.raises(CheckpointError, match=r"shape holds \[3, 2\], which is no whole number"):
        read(edited(tmp_path, BITMASK_24, change), BITMASK_24)


def test_a_file_cut_short_is_refused(tmp_path):
    content = (DATA / "24-0.9.4" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it can't be read"):
        read(tmp_path, BITMASK_24)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x.weight": torch.ones(2)}, tmp_path / name)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(CheckpointError, match=r"b\.safetensors: x\.weight is in .*a\.safetensors"):
        read_parameters(files, BITMASK)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "index.json: it can't be read"),
        ("[]", "index.json: it can't be read"),
        ('{"weight_map": 3}', "index.json: it can't be read"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "it names '../model.safetensors'"),
        ('{"weight_map": {"x": "none.safetensors"}}', "it names 'none.safetensors'"),
        ('{"weight_map": {"x": "model.bin"}}', "it names 'model.bin'"),
        ('{"weight_map": {"x": 3}}', "it names 3"),
        ('{"weight_map": {"x": [3]}}', "index.json: it can't be read"),
    ],
)
def test_an_index_that_is_none_is_refused(content, words, tmp_path):
    for path in (tmp_path / "model.safetensors", tmp_path / "in" / "model.bin"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        weight_files(tmp_path / "in")


def test_a_folder_without_weights_is_refused(tmp_path):
    shutil.copy(DATA / "bitmask-0.8.1" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        convert(tmp_path, tmp_path.parent / "out")


def test_parts_may_lie_in_different_files(tmp_path):
    source = DATA / "bitmask-0.14.0.1"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    files = {index[f"model.layers.0.self_attn.o_proj.{part}"] for part in ("shape", "compressed")}
    assert len(files) == 2
    expected = load_file(source / "dense.safetensors")
    found = read(tmp_path, BITMASK)
    for key, tensor in expected.items():
        stem = key.removesuffix(".weight")
        assert torch.equal(found[key if key in found else stem], tensor)
