"""A save over an older one: whole whenever its process dies, and of nobody else's files."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import CheckpointError, SaveError, SparseConfig
from hf_sparse.checkpoint import commit, staging
from hf_sparse.checkpoint.folder import write_file, write_folder
from hf_sparse.checkpoint.state_dict import sparse_state_dict

SHARDED = {"max_shard_size": "8KB"}
STEPS = ("replace", "link", "unlink", "rmdir")


def sparse_model(seed):
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed)
    hf_sparse.prune(model, SparseConfig(method="magnitude", sparsity=0.5 + seed / 10))
    return model


@pytest.fixture(scope="module")
def models():
    return [sparse_model(seed) for seed in (1, 2)]


def same(loaded, model):
    found, expected = sparse_state_dict(loaded)[0], sparse_state_dict(model)[0]
    config = loaded.config.quantization_config == model.config.quantization_config
    report = loaded.hf_quantizer.report == model.hf_quantizer.report
    return config and report and all(torch.equal(found[key], expected[key]) for key in expected)


def which(folder, models):
    """The number of the model that a folder holds, all of it."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return [i for i, model in enumerate(models) if same(loaded, model)]


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def in_a_process(work):
    """Run work in a process of its own; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(step, work):
    """Run work in a process that dies before its step number `step` in the file system."""
    count = [0]

    def counted(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == step:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    def run():
        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    return in_a_process(run)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (SHARDED, {}),
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param({}, SHARDED, marks=pytest.mark.slow),
        pytest.param(SHARDED, SHARDED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_whenever_a_save_dies_the_old_or_the_new_checkpoint_is_there(models, tmp_path, old, new):
    held = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        models[0].save_pretrained(folder, **old)
        code = dying_at(step, lambda to=folder: models[1].save_pretrained(to, **new))
        assert code in (0, 9)
        held += which(folder, models)
        assert len(held) == step
        if code == 0:
            break
    assert held == sorted(held)  # first the old one, then the new one
    assert set(held) == {0, 1}
    dead = tmp_path / "1"
    assert hidden(dead)
    models[0].save_pretrained(dead)
    assert not hidden(dead)


def test_a_save_over_one_that_died_half_way_is_whole_too(models, tmp_path):
    models[0].save_pretrained(tmp_path, **SHARDED)
    for step in (3, 5, 8, 5, 3):
        dying_at(step, lambda: models[1].save_pretrained(tmp_path, **SHARDED))
        assert which(tmp_path, models) in ([0], [1])
        assert len(hidden(tmp_path)) <= 2
    models[0].save_pretrained(tmp_path)
    assert which(tmp_path, models) == [0]
    assert hidden(tmp_path) == []
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())


def test_processes_that_save_at_once_leave_the_checkpoint_of_one(models, tmp_path):
    for kinds in (({}, SHARDED), (SHARDED, SHARDED)):
        children = []
        for model, kind in zip(models, kinds, strict=True):
            child = os.fork()
            if child == 0:
                try:
                    model.save_pretrained(tmp_path, **kind)
                except BaseException:
                    os._exit(1)
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert len(which(tmp_path, models)) == 1
        assert hidden(tmp_path) == []


def test_without_hard_links_files_are_copied(models, tmp_path, monkeypatch):
    def link(*args):
        raise OSError(1, "Operation not permitted")

    models[0].save_pretrained(tmp_path)
    monkeypatch.setattr(os, "link", link)
    models[1].save_pretrained(tmp_path, **SHARDED)
    assert which(tmp_path, models) == [1]
    assert hidden(tmp_path) == []


def test_a_failure_after_the_commit_says_that_the_new_checkpoint_is_there(
    models, tmp_path, monkeypatch
):
    models[0].save_pretrained(tmp_path)

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(commit, "_link", fail)
    with pytest.raises(SaveError, match=r"complete and loads; save again: .*Input/output error"):
        models[1].save_pretrained(tmp_path)
    assert which(tmp_path, models) == [1]
    monkeypatch.undo()
    models[0].save_pretrained(tmp_path)
    assert which(tmp_path, models) == [0]
    assert hidden(tmp_path) == []


# --- the parts of two saves -----------------------------------------------------------------


def test_shards_index_and_config_of_one_save_have_its_id(models, tmp_path):
    models[0].save_pretrained(tmp_path / "a", **SHARDED)
    models[0].save_pretrained(tmp_path / "again", **SHARDED)
    models[1].save_pretrained(tmp_path / "b", **SHARDED)
    ids = {}
    for name in ("a", "again", "b"):
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        config = json.loads((tmp_path / name / "config.json").read_text())
        found = {index["metadata"]["hf_sparse_save"]}
        found.add(config["quantization_config"]["hf_sparse_save"])
        for file in (tmp_path / name).glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                found.add(opened.metadata()["hf_sparse_save"])
        (ids[name],) = found
    assert ids["a"] == ids["again"] != ids["b"]


@pytest.mark.parametrize("moved", ["model-00001-*", "model-00002-*", "config.json", "*.index.json"])
def test_the_parts_of_two_saves_are_refused(models, tmp_path, moved):
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name, **SHARDED)
    (path,) = (tmp_path / "b").glob(moved)
    shutil.copy(path, tmp_path / "a" / path.name)
    with pytest.raises(CheckpointError, match=r"of save '\w{32}'.*save the model there again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_one_file_beside_the_config_of_shards_is_refused(models, tmp_path):
    for name, kind in (("a", SHARDED), ("b", {})):
        models[0].save_pretrained(tmp_path / name, **kind)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"config\.json.*a save without an id"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_a_config_that_was_written_anew_and_a_variant_are_not_refused(models, tmp_path):
    models[0].save_pretrained(tmp_path, **SHARDED)
    models[1].save_pretrained(tmp_path, variant="ema", **SHARDED)
    assert which(tmp_path, models[:1]) == []  # report and config are of the variant
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="ema")
    assert same(loaded, models[1])
    models[0].config.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


# --- what is not the save's own -------------------------------------------------------------


def test_a_rank_that_does_not_save_changes_nothing(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    models[1].save_pretrained(tmp_path, is_main_process=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_saved_beside_its_base_leaves_the_base(tmp_path):
    from peft import LoraConfig

    model = sparse_model(1)
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:
        pytest.skip(f"transformers' own adapters: {error}")
    model.save_pretrained(tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    added = {"adapter_model.safetensors", "adapter_config.json"}
    assert {name: after[name] for name in after.keys() - added} == before
    assert added < after.keys()


def test_other_variants_and_the_users_files_stay(models, tmp_path):
    models[0].save_pretrained(tmp_path, variant="ema", **SHARDED)
    others = {path.name for path in tmp_path.glob("model.*ema*")}
    (tmp_path / "model_optimizer_state.safetensors").write_text("mine")
    models[1].save_pretrained(tmp_path, **SHARDED)
    models[1].save_pretrained(tmp_path)
    held = {path.name for path in tmp_path.iterdir()}
    assert others | {"model_optimizer_state.safetensors", "model.safetensors"} <= held
    assert not list(tmp_path.glob("model-0*"))


# --- where it is written --------------------------------------------------------------------


def test_nothing_is_written_beside_the_folder(models, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = tmp_path.stat().st_mtime_ns
    models[0].save_pretrained(tmp_path / "link")
    assert tmp_path.stat().st_mtime_ns == before
    assert (tmp_path / "link").is_symlink()
    assert which(tmp_path / "real", models) == [0]


def test_the_umask_decides_who_may_read(models, tmp_path):
    for mask, expected in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            models[0].save_pretrained(tmp_path / oct(mask), **SHARDED)
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / oct(mask)).iterdir()}
        assert modes == {expected}


def test_a_folder_in_a_files_place_is_said_before_anything_changes(tmp_path):
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "a.txt").write_text("old")

    def save(folder):
        for name in ("a.txt", "b.txt"):
            with open(os.path.join(folder, name), "w") as file:
                file.write("new")

    with pytest.raises(SaveError, match=r"nothing was changed there: 'b\.txt' is a folder"):
        write_folder(tmp_path, save)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert hidden(tmp_path) == []


def test_links_that_someone_planted_are_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(staging.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".page.html-guessed").symlink_to(tmp_path / "victim")
    with pytest.raises(SaveError, match="File exists"):
        write_file(tmp_path / "page.html", "<html>")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_of_the_users_is_no_dead_save(tmp_path):
    mine = [tmp_path / ".hf_sparse-save-settings-of-mine", tmp_path / ".hf_sparse-save-abcdefgh"]
    mine[0].mkdir()
    mine[1].symlink_to(mine[0])
    write_folder(tmp_path, lambda folder: None)
    assert sorted(tmp_path.iterdir()) == sorted(mine)
