"""Processes that save to one folder, where one that saves nothing has created it."""

import contextlib
import threading
from pathlib import Path

import pytest

from hf_sparse import SaveError
from hf_sparse.checkpoint import staging
from hf_sparse.checkpoint.folder import write_folder
from hf_sparse.checkpoint.staging import staging_folder


def save(folder):
    write_folder(folder, lambda place: Path(place, "config.json").write_text("{}"))


@pytest.fixture
def other(tmp_path):
    """A save of another rank that has begun, has created the folder, and will write nothing."""
    process = staging_folder(tmp_path / "run" / "model")
    process.__enter__()
    ended = []

    def end():
        if not ended:
            ended.append(True)
            process.__exit__(None, None, None)

    yield end
    end()


def before(monkeypatch, owner, name, end, matches=lambda *args: True):
    """Let the other rank end right before a call of ours is made."""
    call = getattr(owner, name)

    def watched(*args, **kwargs):
        if matches(*args):
            end()
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


def test_the_folder_goes_between_its_creation_and_the_lock(tmp_path, other, monkeypatch):
    before(monkeypatch, staging, "locked", other)
    save(tmp_path / "run" / "model")
    assert [path.name for path in (tmp_path / "run" / "model").iterdir()] == ["config.json"]


def test_the_folder_goes_between_its_opening_and_the_lock(tmp_path, other, monkeypatch):
    before(monkeypatch, staging.fcntl, "flock", other)
    save(tmp_path / "run" / "model")
    assert [path.name for path in (tmp_path / "run" / "model").iterdir()] == ["config.json"]


def test_a_parent_goes_while_the_folder_is_created(tmp_path, monkeypatch):
    """The other rank has created the parent alone, for a folder of its own in it."""
    process = contextlib.ExitStack()
    process.enter_context(staging_folder(tmp_path / "run" / "other"))
    before(monkeypatch, Path, "mkdir", process.close, lambda path, *_: path.name == "model")
    save(tmp_path / "run" / "model")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_no_save_begins_while_an_empty_folder_is_removed(tmp_path, other, monkeypatch):
    threads, remove = [], Path.rmdir

    def watched(path):
        if path.name == "model" and not threads:
            threads.append(threading.Thread(target=save, args=[path]))
            threads[0].start()
            threads[0].join(0.3)
        remove(path)

    monkeypatch.setattr(Path, "rmdir", watched)
    other()
    threads[0].join()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_folder_stays_in_which_another_one_appears_before_it_is_removed(
    tmp_path, other, monkeypatch
):
    remove = Path.rmdir

    def watched(path):
        if path.name == "run":
            (path / "theirs").mkdir()
        remove(path)

    monkeypatch.setattr(Path, "rmdir", watched)
    other()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["theirs"]


def test_a_save_that_writes_nothing_leaves_no_folder(tmp_path, other):
    other()
    assert list(tmp_path.iterdir()) == []


def test_a_hidden_folder_of_a_living_save_stays(tmp_path):
    with staging_folder(tmp_path) as first:
        save(tmp_path)
        assert first.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["", "a" * 300, "/".join(["d" * 200] * 25), "a\0b"])
def test_a_name_that_no_folder_can_have_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match="can't save to"):
        write_folder(name, lambda place: None)
    assert list(tmp_path.iterdir()) == []
