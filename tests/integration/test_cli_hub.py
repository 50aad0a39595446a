"""The command line against a Hub: pruning to it, looking into it, being refused by it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import LAYERS, Client
from hub_server import READ_TOKEN, Hub, Repo, serve
from tiny_models import tiny_llama

from conftest import ROOT

# Runs command lines, given as JSON, one after the other; prints each one's results as JSON.
RUN = """
import contextlib, io, json, sys
from hf_sparse_cli import main

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(path)
    return path


def run(client: Client, *commands: list[str], **env: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command."""
    done = client.run(RUN, json.dumps(commands), **env)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def sentence(result: tuple[int, str, str]) -> str:
    """What a command that failed said."""
    code, out, err = result
    assert (code, out) == (1, "")
    return err.splitlines()[-1].removeprefix("Error: ")


def test_a_model_is_pruned_to_the_hub_and_inspected_there(
    hub: Hub, dense: Path, tmp_path: Path
) -> None:
    client = Client(hub, tmp_path / "home")
    out = str(tmp_path / "out")
    prune = ["prune", str(dense), "--method", "magnitude", "--output", out, "--overwrite"]
    hub.repos["you/shared"] = Repo(private=False)
    hub.repos["you/shared"].commit("main", {})
    pushed, branch, proposed, seen, missing, revision, theirs = run(
        client,
        [*prune, "--push-to-hub", "me/pruned", "--private", "--json"],
        [*prune, "--push-to-hub", "me/pruned", "--push-revision", "second"],
        [*prune, "--push-to-hub", "you/shared", "--create-pr"],
        ["inspect", "me/pruned", "--json"],
        ["inspect", "me/missing"],
        ["inspect", "me/pruned", "--revision", "nope"],
        [*prune, "--push-to-hub", "you/pruned"],
    )
    assert pushed[0] == 0, pushed
    assert json.loads(pushed[1])["pushed"] == "me/pruned"
    repo = hub.repos["me/pruned"]
    assert repo.private
    stored = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert repo.files()["model.safetensors"] == stored

    assert (branch[0], proposed[0]) == (0, 0), (branch, proposed)
    assert repo.files("second")["model.safetensors"] == stored
    assert hub.repos["you/shared"].files() == {}
    assert hub.repos["you/shared"].files("refs/pr/1")["model.safetensors"] == stored

    values = json.loads(seen[1])
    assert len(values["layers"]) == LAYERS
    downloads = [r for r in hub.requests if r.startswith("GET") and "model.safetensors" in r]
    assert downloads  # ranges of it: the headers
    assert not list((tmp_path / "home").rglob("model.safetensors"))

    assert "there is no folder me/missing, and from the Hub: the Hub has no such" in sentence(
        missing
    )
    assert "no such revision or file" in sentence(revision)
    assert "you/pruned belongs to you, and the token in use to me" in sentence(theirs)
    assert "you/pruned" not in hub.repos


def test_a_push_that_fails_leaves_what_was_saved_and_says_how_to_go_on(
    hub: Hub, dense: Path, tmp_path: Path
) -> None:
    client, out = Client(hub, tmp_path / "home"), tmp_path / "out"
    hub.failures["POST /api/models/me/cut/commit/main"] = None
    prune = ["prune", str(dense), "--method", "magnitude", "--output", str(out)]
    (result,) = run(client, [*prune, "--push-to-hub", "me/cut"])
    said = sentence(result)
    assert said.startswith(f"saved in {out}, but not pushed, `hf upload me/cut {out}` tries again:")
    assert "the connection broke off" in said
    assert {"README.md", "config.json", "model.safetensors", "pruning_report.json"} <= {
        path.name for path in out.iterdir()
    }
    assert set(hub.repos["me/cut"].files()) == {".gitattributes"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"HF_TOKEN": "hf_expired"}, "the Hub refused the token, it is wrong or has expired"),
        ({"HF_TOKEN": READ_TOKEN}, "the token in use may only read, and me/x is to be written"),
        ({"HF_TOKEN": ""}, "this needs a Hub token, and there is none"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and this needs the Hub"),
    ],
)
def test_a_push_that_can_not_succeed_is_refused_before_the_work(
    hub: Hub, dense: Path, tmp_path: Path, env: dict[str, str], words: str
) -> None:
    client = Client(hub, tmp_path / "home")
    prune = ["prune", str(dense), "--method", "magnitude", "--output", str(tmp_path / "out")]
    result, model = run(client, [*prune, "--push-to-hub", "me/x"], ["inspect", "me/x"], **env)
    assert words in sentence(result)
    assert not (tmp_path / "out").exists()
    assert "me/x" not in hub.repos
    expected = {"hf_expired": "wrong or has expired", "1": "not in the cache"}
    value = next(iter(env.values()))
    assert expected.get(value, "the Hub has no such repository") in sentence(model)


def test_an_old_checkpoint_is_fetched_and_converted_without_its_other_weights(
    hub: Hub, tmp_path: Path
) -> None:
    source = ROOT / "tests" / "data" / "bitmask-0.14.0.1"
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    del files["dense.safetensors"]
    hub.repos["me/old"] = Repo(private=False)
    hub.repos["me/old"].commit("main", files | {"pytorch_model.bin": b"pickle"})
    hub.repos["me/dense"] = Repo(private=False)
    hub.repos["me/dense"].commit("main", {"config.json": b"{}", "model.safetensors": b"large"})
    client = Client(hub, tmp_path / "home")
    output = ["--output", str(tmp_path / "out")]
    refused, done = run(client, ["convert", "me/dense", *output], ["convert", "me/old", *output])
    assert "me/dense is dense" in sentence(refused)
    assert done[0] == 0, done
    assert "7 layers packed" in done[1]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    fetched = [request for request in hub.requests if request.startswith("GET")]
    assert not [r for r in fetched if "pytorch_model" in r or "me/dense/resolve/main/model" in r]
