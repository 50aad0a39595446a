"""From disk to disk: the bytes of a run in memory, also after deaths, and no block in between."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from killed_runs import config, digests
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import DECODER, T5, build, tiny_llama
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

import hf_sparse.publish.streaming.ledger as ledger
from conftest import ROOT
from hf_sparse import CheckpointError, ConfigError, SaveError, clear_checkpoint, prune_checkpoint

IDS = torch.randint(3, 61, (6, 12), generator=torch.Generator().manual_seed(1))
PAIRS = [{"input_ids": ids[None], "decoder_input_ids": ids[None, :7]} for ids in IDS]


def mixtral():
    return build(MixtralForCausalLM, MixtralConfig(**DECODER, num_local_experts=4))


def t5():
    return build(T5ForConditionalGeneration, T5Config(**T5))


def save(make, folder):
    make().save_pretrained(folder)
    return folder


def in_memory(source, settings, target, **save_options):
    """The same in memory: what is to be had from disk to disk."""
    named = json.loads((source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(source, quantization_config=settings)
    model.save_pretrained(target, **save_options)
    return digests(target)


class Death(BaseException):
    """What stops a run."""


@pytest.fixture
def dying(monkeypatch):
    """A function that lets runs die when they would write their n-th block from now."""

    def after(blocks, error):
        left = iter(range(blocks))

        def write(tensors, path, metadata):
            if next(left, None) is None:
                raise error
            save_file(tensors, path, metadata)

        monkeypatch.setattr(ledger, "save_file", write)

    return after


@pytest.mark.parametrize(
    ("make", "changes", "shards"),
    [
        (tiny_llama, {"method": "magnitude", "dataset": None}, "50GB"),
        (
            partial(tiny_llama, tie_word_embeddings=True),
            {"pattern": "2:4", "sparsity": None},
            "1GB",
        ),
        (partial(tiny_llama, num_hidden_layers=3), {"allocation": "owl"}, "20KB"),
        (tiny_llama, {"target": "dense", "stages": True, "bits": 4}, "50GB"),
        (mixtral, {"stages": True}, "50GB"),
        (mixtral, {"method": "wanda", "targets": ["layers.0"]}, "20KB"),
        (t5, {"dataset": PAIRS}, "50GB"),
    ],
    ids=["magnitude", "tied", "owl", "dense", "mixture", "part of a mixture", "encoder-decoder"],
)
def test_the_result_has_the_bytes_of_a_run_in_memory(make, changes, shards, tmp_path):
    source = save(make, tmp_path / "dense")
    expected = in_memory(source, config(**changes), tmp_path / "memory", max_shard_size=shards)
    report = prune_checkpoint(source, config(**changes), tmp_path / "disk", max_shard_size=shards)
    assert digests(tmp_path / "disk") == expected
    assert report.layers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "disk", "memory"]


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (partial(tiny_llama, num_hidden_layers=3), {}),
        (tiny_llama, {"target": "dense"}),
        (t5, {"dataset": PAIRS}),
        (mixtral, {}),
        (tiny_llama, {"method": "magnitude", "dataset": None}),
    ],
    ids=["decoder", "dense", "encoder-decoder", "mixture", "no data"],
)
def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(make, changes, tmp_path, dying):
    source = save(make, tmp_path / "dense")
    expected = in_memory(source, config(**changes), tmp_path / "memory")
    run = partial(prune_checkpoint, source, checkpoint_dir=tmp_path / "run")
    for blocks in (1, 0):
        dying(blocks, Death())
        with pytest.raises(Death):
            run(config(**changes), tmp_path / "disk")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert len(manifest["blocks"]) == 1
    dying(100, Death())
    report = run(config(**changes), tmp_path / "disk")
    assert digests(tmp_path / "disk") == expected
    assert len({layer.block for layer in report.layers}) > 1
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_and_what_is_done_is_kept(tmp_path, dying):
    source = save(partial(tiny_llama, num_hidden_layers=3), tmp_path / "dense")
    expected = in_memory(source, config(), tmp_path / "memory")
    run = partial(prune_checkpoint, source, config(), tmp_path / "disk")
    dying(1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SaveError, match=r"layers\.1 .* No space left .*run it again to go on"):
        run(checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "disk").exists()
    dying(2, Death())
    run(checkpoint_dir=tmp_path / "run")
    assert digests(tmp_path / "disk") == expected


def test_a_disk_that_is_full_of_what_blocks_made_of_the_batches_is_told(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = save(tiny_llama, tmp_path / "dense")
    monkeypatch.setattr("hf_sparse.calibration.activations.save_file", fail)
    with pytest.raises(SaveError, match=r"layers\.0 made .* No space left .*run it again to go on"):
        prune_checkpoint(source, config(), tmp_path / "disk", checkpoint_dir=tmp_path / "run")


@pytest.fixture
def broken_off(tmp_path, dying):
    """A run with one block finished, as a function that goes on with it."""
    source = save(tiny_llama, tmp_path / "dense")
    dying(1, Death())
    with pytest.raises(Death):
        prune_checkpoint(source, config(), tmp_path / "disk", checkpoint_dir=tmp_path / "run")
    dying(100, Death())

    def go_on(settings=None, **options):
        settings = settings or config()
        options = {"checkpoint_dir": tmp_path / "run"} | options
        return prune_checkpoint(source, settings, tmp_path / "disk", **options)

    return go_on


def test_another_config_is_refused(broken_off):
    with pytest.raises(ConfigError, match=r"config: sparsity was 0\.5, is 0\.6"):
        broken_off(config(sparsity=0.6))


def test_other_data_are_refused(broken_off):
    other = list(IDS)
    with pytest.raises(ConfigError, match=r"config: dataset was .* is "):
        broken_off(config(dataset=other))


def test_another_dtype_is_refused(broken_off):
    with pytest.raises(ConfigError, match=r"dtype was torch\.float32, is torch\.bfloat16"):
        broken_off(dtype="bfloat16")


def test_a_changed_weight_of_the_model_is_noticed(broken_off, tmp_path):
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"file model\.safetensors was .* is "):
        broken_off()


def test_another_version_of_a_package_is_refused(broken_off, tmp_path):
    path = tmp_path / "run" / "manifest.json"
    content = json.loads(path.read_text())
    content["run"]["version of torch"] = "1.0"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"version of torch was 1\.0, is "):
        broken_off()


@pytest.mark.parametrize("kind", ["blocks", "outputs"])
def test_a_damaged_file_of_a_run_is_refused(kind, broken_off, tmp_path):
    path = next((tmp_path / "run" / kind).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name}: it is damaged.*clear_checkpoint"):
        broken_off()


def test_a_manifest_that_leads_out_of_the_folder_is_refused(broken_off, tmp_path):
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace("00000.safetensors", "../../dense/model.safetensors"))
    with pytest.raises(CheckpointError, match="which is no file of a run"):
        broken_off()


def test_one_call_cleans_up_and_leaves_other_files(broken_off, tmp_path):
    (tmp_path / "run" / "notes.txt").write_text("mine")
    clear_checkpoint(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    broken_off()
    clear_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["blocks", "outputs"])
def test_the_user_s_files_in_folders_of_a_run_s_names_stay(part, tmp_path):
    mine = tmp_path / "run" / part / "00000.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for use in (clear_checkpoint, lambda run: ledger.Ledger(run, {}, resumable=True)):
        with pytest.raises(SaveError, match=rf"{part}' holds files that are not a run's"):
            use(tmp_path / "run")
    assert mine.read_text() == "mine"


def test_only_what_a_run_has_named_is_removed(broken_off, tmp_path):
    names = "blocks/model.safetensors", "outputs/best.safetensors", "waiting-room/a.txt"
    mine = [tmp_path / "run" / name for name in names]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    clear_checkpoint(tmp_path / "run")
    assert all(path.read_text() == "mine" for path in mine)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("part", ["blocks", "outputs"])
def test_a_run_s_folder_that_is_a_link_is_refused_and_nothing_removed(part, broken_off, tmp_path):
    place = tmp_path / "run" / part
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    held = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    for use in (broken_off, lambda: clear_checkpoint(tmp_path / "run")):
        with pytest.raises(SaveError, match=f"{part}' is a link"):
            use()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == held


@pytest.mark.parametrize("kind", ["blocks", "outputs"])
def test_a_link_in_place_of_a_run_s_file_is_refused(kind, broken_off, tmp_path):
    path = next((tmp_path / "run" / kind).glob("*.safetensors"))
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"{path.name}: it is missing, or no file of its"):
        broken_off()


def test_a_block_s_file_must_hold_what_the_manifest_says(broken_off, tmp_path):
    """Of a folder that somebody else has made: all digests are right."""
    path = tmp_path / "run" / "manifest.json"
    sound = json.loads(path.read_text())
    entry = sound["blocks"][0]

    def refused(changed, match):
        path.write_text(json.dumps(sound | {"blocks": [entry | changed]}))
        with pytest.raises(CheckpointError, match=match):
            broken_off()

    refused({"layers": entry["layers"][1:]}, rf"manifest says of .*: {entry['layers'][0]['name']}")
    refused({"name": "model.layers.1"}, r"manifest says of model\.layers\.1: model\.layers\.0")


def test_a_block_of_another_shape_is_refused(broken_off, tmp_path):
    block = tmp_path / "run" / "blocks" / "00000.safetensors"
    with safe_open(block, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(block)
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(3)
    save_file(tensors, block, metadata)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["blocks"][0]["digest"] = hashlib.sha256(block.read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight is a .* of shape \(3,\)"):
        broken_off()


def test_two_runs_in_one_folder_are_refused(tmp_path):
    held = ledger.Ledger(tmp_path / "run", {}, resumable=True)
    with pytest.raises(SaveError, match="in use by another run"):
        ledger.Ledger(tmp_path / "run", {}, resumable=True)
    held.close()
    ledger.Ledger(tmp_path / "run", {}, resumable=True).close()


def test_gradients_of_the_whole_model_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="metric='fisher' takes gradients"):
        prune_checkpoint("nowhere", config("best", dataset=["text"]), tmp_path / "disk")


def test_folders_that_are_in_each_other_are_refused(tmp_path):
    source = save(tiny_llama, tmp_path / "dense")
    before = sorted(tmp_path.rglob("*")), digests(source)
    (tmp_path / "link").symlink_to(source)
    out, run = tmp_path / "out", tmp_path / "run"
    for output, kept, told in (
        (source, None, "output_dir .* is the same folder as the model's folder"),
        (source / ".", None, "output_dir .* is the same folder as"),
        (tmp_path / "link", None, "output_dir .* is the same folder as"),
        (tmp_path / "link" / "sparse", None, "output_dir .* is in the model's folder"),
        (tmp_path, None, "the model's folder .* is in output_dir"),
        (out, source / "run", "checkpoint_dir .* is in the model's folder"),
        (out, source / "..", "is in checkpoint_dir"),
        (out, tmp_path / "." / "out", "checkpoint_dir .* is the same folder as output_dir"),
        (out, out / "run", "checkpoint_dir .* is in output_dir"),
        (run / "outputs", run, "output_dir .* is in checkpoint_dir"),
    ):
        with pytest.raises(ConfigError, match=told):
            prune_checkpoint(source, config(), output, checkpoint_dir=kept)
    (tmp_path / "link").unlink()
    assert (sorted(tmp_path.rglob("*")), digests(source)) == before


def test_what_is_no_folder_or_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    source = save(tiny_llama, tmp_path / "dense")
    (tmp_path / "file").touch()
    for value, error, told in (
        ("a\0b", ConfigError, "is no folder"),
        ("", ConfigError, "is no folder"),
        (5, ConfigError, "=5 is no folder"),
        (b"out", ConfigError, "is no folder"),
        (tmp_path / "file", SaveError, "is a file"),
    ):
        with pytest.raises(error, match=f"output_dir.*{told}"):
            prune_checkpoint(source, config(), value)
        with pytest.raises(error, match=f"checkpoint_dir.*{told}"):
            prune_checkpoint(source, config(), tmp_path / "out", checkpoint_dir=value)
    closed = tmp_path / "closed"
    closed.mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, how: path != closed and may(path, how))
    for output in (closed, closed / "out"):
        with pytest.raises(SaveError, match=r"nothing can be written in .*closed"):
            prune_checkpoint(source, config(), output)
    with pytest.raises(SaveError, match=r"nothing can be written in .*closed"):
        prune_checkpoint(source, config(), tmp_path / "out", checkpoint_dir=closed / "run")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_needs_nothing_beside_it(tmp_path):
    source = save(tiny_llama, tmp_path / "dense")
    (tmp_path / "out").mkdir()
    made = set()

    def write(*arguments):
        made.update(path.name[:15] for path in (tmp_path / "out").iterdir())
        return original(*arguments)

    original, ledger.save_file = ledger.save_file, write
    try:
        prune_checkpoint(source, config(), tmp_path / "out")
    finally:
        ledger.save_file = original
    assert made == {".hf_sparse-run-"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_layer_in_a_file_is_told_by_the_bytes_that_are_stored(tmp_path):
    source = save(tiny_llama, tmp_path / "dense")
    report = prune_checkpoint(source, config(), tmp_path / "disk")
    assert all(layer.bytes_resident == layer.bytes_after for layer in report.layers)
    assert report.bytes_resident < report.bytes_before


def test_experts_are_not_removed_from_disk_to_disk(tmp_path):
    wanted = config(experts=0.25, dataset=["text"])
    with pytest.raises(ConfigError, match=r"experts=0\.25 needs the whole model in memory"):
        prune_checkpoint("nowhere", wanted, tmp_path / "disk")


def test_a_model_without_some_of_its_weights_is_refused(tmp_path):
    source = save(tiny_llama, tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"have no model\.layers\.1\.mlp\.down_proj\.weight"):
        prune_checkpoint(source, config(), tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


@pytest.mark.slow
def test_thirty_kills_at_random_moments_leave_no_trace(tmp_path):
    path = ROOT / "tests" / "helpers" / "killed_runs.py"
    done = subprocess.run(
        [sys.executable, path, tmp_path, "30", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(tmp_path / "dense")
