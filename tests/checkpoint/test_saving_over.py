"""A save over an older one: whole whenever its process dies, and of nobody else's files."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import CheckpointError, SaveError, SparseConfig
from hf_sparse.checkpoint import commit, staging
from hf_sparse.checkpoint.folder import write_file, write_folder
from hf_sparse.checkpoint.state_dict import sparse_state_dict
from hf_sparse.checkpoint.weight_files import GUARD, pointer
from hf_sparse.layers import sparse_layers
from hf_sparse.training.masks import Masks
from hf_sparse_cli.failures import Failure
from hf_sparse_cli.headers import read_headers

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


@pytest.mark.slow
@pytest.mark.parametrize("new", [{}, SHARDED], ids=str)
@pytest.mark.parametrize("old", [{}, SHARDED], ids=str)
def test_whenever_a_save_dies_the_old_or_the_new_checkpoint_is_there(models, tmp_path, old, new):
    held = []
    models[0].save_pretrained(tmp_path / "old", **old)
    for step in range(1, 100):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(step))
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


@pytest.mark.parametrize(("old", "new"), [({}, SHARDED), (SHARDED, {})], ids=str)
def test_nothing_is_left_of_the_old_weights_when_config_json_is_the_last_to_come(
    models, tmp_path, old, new, monkeypatch
):
    models[0].save_pretrained(tmp_path, **old)
    models[1].save_pretrained(tmp_path / "new", **new)
    expected = {path.name for path in (tmp_path / "new").glob("model*")}
    held, real = [], os.replace

    def replace(source, target):
        if os.path.basename(target) == "config.json":
            held.append({path.name for path in tmp_path.glob("model*")})
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    models[1].save_pretrained(tmp_path, **new)
    assert len(held) == 2
    assert not held[0] & expected - {"model.safetensors"}
    assert held[1] == expected


def test_a_save_over_one_that_died_half_way_is_whole_too(models, tmp_path):
    models[0].save_pretrained(tmp_path, **SHARDED)
    for step in (3, 5, 8, 5, 3):
        dying_at(step, lambda: models[1].save_pretrained(tmp_path, **SHARDED))
        assert which(tmp_path, models) in ([0], [1])
        assert len(hidden(tmp_path)) <= 2
    models[0].save_pretrained(tmp_path)
    assert which(tmp_path, models) == [0]
    assert hidden(tmp_path) == []
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformers_weights"] == GUARD


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


def verify(folder, model):
    masks = Masks()
    for name, layer in sparse_layers(model).items():
        masks[name] = layer.sparse_weight != 0
    masks.check_checkpoint(folder, model)


def inspect(folder, model):
    config = json.loads((folder / "config.json").read_text())
    return read_headers(str(folder), None, config)


def page(folder, model):
    hf_sparse.write_report(model.hf_quantizer.report, folder / "page.html", masks=folder)
    return (folder / "page.html").read_text()


READERS = {
    "the loader": lambda folder, model: AutoModelForCausalLM.from_pretrained(folder),
    "verifying": verify,
    "inspect": inspect,
    "the page": page,
}
every_reader = pytest.mark.parametrize("reader", READERS)


@every_reader
@pytest.mark.parametrize(
    ("kinds", "moved"),
    [
        ((SHARDED, SHARDED), "model-00001-*"),
        ((SHARDED, SHARDED), "model-00002-*"),
        ((SHARDED, SHARDED), "config.json"),
        ((SHARDED, SHARDED), "*.index.json"),
        ((SHARDED, {}), "model.safetensors"),
        (({}, {}), "model.safetensors"),
        (({}, {}), "config.json"),
    ],
    ids=str,
)
def test_the_parts_of_two_saves_are_refused(models, tmp_path, reader, kinds, moved):
    twin = sparse_model(1.5)  # a mask as that of the second: only values tell them apart
    for name, model, kind in zip("ab", (models[1], twin), kinds, strict=True):
        model.save_pretrained(tmp_path / name, **kind)
    READERS[reader](tmp_path / "a", models[1])
    (path,) = (tmp_path / "b").glob(moved)
    shutil.copy(path, tmp_path / "a" / path.name)
    with pytest.raises((CheckpointError, Failure), match=r"of save '\w{32}'.*save the model there"):
        READERS[reader](tmp_path / "a", models[1])


@every_reader
def test_a_tensor_in_two_shards_is_refused(models, tmp_path, reader):
    models[0].save_pretrained(tmp_path, **SHARDED)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    with safe_open(second, framework="pt") as file:
        said, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with safe_open(first, framework="pt") as file:
        key = next(iter(file.keys()))
        save_file(tensors | {key: file.get_tensor(key) * 2}, second, said)
    with pytest.raises((CheckpointError, Failure), match=f"{key} is in .*{first.name}, too"):
        READERS[reader](tmp_path, models[0])


@pytest.fixture(scope="module")
def killed(models, tmp_path_factory):
    """A folder whose save died after its commit, and one in which it came to its end."""
    folder = tmp_path_factory.mktemp("killed")
    models[0].save_pretrained(folder / "old")
    models[1].save_pretrained(folder / "new", **SHARDED)
    for step in range(1, 100):
        dead = shutil.copytree(folder / "old", folder / str(step))
        dying_at(step, lambda to=dead: models[1].save_pretrained(to, **SHARDED))
        if pointer(dead):
            return dead, folder / "new"
    raise AssertionError("no death left the weights where they were staged")


@every_reader
def test_after_a_kill_every_reader_finds_the_new_checkpoint(models, killed, reader):
    found, expected = (READERS[reader](folder, models[1]) for folder in killed)
    assert same(found, models[1]) if reader == "the loader" else found == expected


@pytest.mark.parametrize("reader", ["verifying", "inspect", "the page"])
@pytest.mark.parametrize("name", ["../b/model.safetensors", "/b/model.safetensors", 3, "a.bin"])
def test_an_index_that_leads_elsewhere_is_refused(models, tmp_path, reader, name):
    models[0].save_pretrained(tmp_path / "a", **SHARDED)
    models[0].save_pretrained(tmp_path / "b")
    index = tmp_path / "a" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises((CheckpointError, Failure), match=r"index\.json: .*which is no"):
        READERS[reader](tmp_path / "a", models[0])


def test_a_shard_in_another_folder_is_not_loaded(models, tmp_path):
    models[0].save_pretrained(tmp_path / "a", **SHARDED)
    index = tmp_path / "a" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = sorted(set(content["weight_map"].values()))[-1]
    shutil.move(tmp_path / "a" / last, tmp_path / last)
    moved = {k: v.replace(last, f"../{last}") for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content | {"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"safetensors: it is in another folder than "):
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
