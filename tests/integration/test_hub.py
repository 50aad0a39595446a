"""Pushing to and loading from a Hub, with the real client, over HTTP, in processes of their own."""

import json
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest
import torch
from hub_client import LAYERS, Client
from hub_server import READ_TOKEN, Hub, serve
from safetensors import safe_open
from safetensors.torch import load, load_file
from tiny_models import tiny_llama
from torch import Tensor

# Prunes the dense model in sys.argv[1]; results go to the folder sys.argv[2].
PRUNE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from hf_sparse import SparseConfig

dense, folder = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(
    dense, quantization_config=SparseConfig(method="magnitude")
)
ids = torch.arange(3, 61).reshape(2, 29)
"""


def contents(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that a push shares with a saved folder; a card has the name of its place in it."""
    added = (".gitattributes", "README.md", "pruning_report.html")
    return {path: content for path, content in files.items() if path not in added}


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """A user with an empty cache."""
    return Client(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that `tiny` is."""
    path = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def logits(hub: Hub, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What the pruned model computes before it is pushed to me/tiny-sparse and me/shards."""
    folder = tmp_path_factory.mktemp("push")
    code = """
with torch.no_grad():
    save_file({"logits": model(ids).logits}, folder / "logits.safetensors")
model.push_to_hub("me/tiny-sparse")
model.push_to_hub("me/shards", max_shard_size="20KB")
"""
    Client(hub, folder / "home").check(PRUNE + code, dense, folder)
    return load_file(folder / "logits.safetensors")["logits"]


@pytest.mark.usefixtures("logits")
def test_a_pushed_repository_holds_packed_tensors_and_a_config_that_names_hf_sparse(
    hub: Hub, dense: Path, tmp_path: Path
) -> None:
    files = hub.repos["me/tiny-sparse"].files()
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} < set(files)
    assert not [path for path in files if path.endswith(".index.json")]
    assert not [path for path in files if "token" in path]  # none is made up
    config = json.loads(files["config.json"])
    assert config["quantization_config"]["quant_method"] == "hf_sparse"
    assert b"sparsity_config" not in files["config.json"]

    copy = tmp_path / "model.safetensors"
    copy.write_bytes(files["model.safetensors"])
    with safe_open(copy, framework="pt") as file:
        described = json.loads(file.metadata()["hf_sparse"])["layers"]
    stored, original = load(files["model.safetensors"]), load_file(dense / "model.safetensors")
    pruned = {key.removesuffix(".weight") for key in original if "_proj." in key}
    assert set(described) == pruned
    for name in pruned:
        before = original[f"{name}.weight"]
        assert stored[f"{name}.weight"].shape == (before.numel() // 2,)
        assert stored[f"{name}.weight_bitmask"].dtype == torch.uint8
        assert stored[f"{name}.weight"].abs().min() >= before.abs().median()


def test_a_loaded_model_has_the_pushed_model_s_logits_online_and_then_offline(
    client: Client, logits: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "loaded.safetensors"
    assert torch.equal(client.logits("me/tiny-sparse", out), logits)
    asked = len(client.hub.requests)
    assert torch.equal(client.logits("me/tiny-sparse", out, HF_HUB_OFFLINE="1"), logits)
    assert len(client.hub.requests) == asked


def test_a_sharded_push_loads_again(client: Client, logits: Tensor, tmp_path: Path) -> None:
    files = client.hub.repos["me/shards"].files()
    shards = [path for path in files if path.endswith(".safetensors")]
    index = json.loads(files["model.safetensors.index.json"])
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == set(shards)
    tensors = {key: shard for shard in shards for key in load(files[shard])}
    assert index["weight_map"] == tensors
    assert torch.equal(client.logits("me/shards", tmp_path / "loaded.safetensors"), logits)


def test_private_revision_and_create_pr_reach_the_hub(
    client: Client, dense: Path, logits: Tensor, tmp_path: Path
) -> None:
    code = """
model.push_to_hub("me/secret", private=True, revision="sparse")
model.push_to_hub("me/secret", create_pr=True)
"""
    client.check(PRUNE + code, dense, tmp_path)
    repo = client.hub.repos["me/secret"]
    assert repo.private
    assert not client.hub.repos["me/tiny-sparse"].private
    assert set(repo.refs) == {"main", "sparse", "refs/pr/1"}
    assert "model.safetensors" not in repo.files("main")
    assert contents(repo.files("sparse")) == contents(repo.files("refs/pr/1"))

    # What was loaded from there is pushed elsewhere, unchanged.
    loaded = client.logits(
        "me/secret", tmp_path / "out.safetensors", "sparse", 'model.push_to_hub("me/copy")'
    )
    assert torch.equal(loaded, logits)
    assert contents(client.hub.repos["me/copy"].files()) == contents(repo.files("sparse"))


@pytest.mark.usefixtures("logits")
def test_a_push_that_the_hub_refuses_raises_and_leaves_the_repository_as_it_was(
    client: Client, dense: Path, tmp_path: Path
) -> None:
    repo = client.hub.repos["me/tiny-sparse"]
    before = dict(repo.refs), len(repo.commits), set(client.hub.repos)
    code = """
from hf_sparse import HubError

def refused(push, name, token):
    try:
        push(name, token)
    except HubError as error:
        return error.__cause__.response.status_code

def push(name, token):
    model.push_to_hub(name, token=token)

def save(name, token):
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id=name, token=token)

with torch.no_grad():
    model.model.embed_tokens.weight.mul_(2)  # so that there is something to push
results = [
    refused(action, name, token)
    for token in ("hf_wrong", "TOKEN")
    for name in ("me/tiny-sparse", "me/not-there")
    for action in (push, save)
]
(folder / "refusals.json").write_text(json.dumps(results))
"""
    client.check(PRUNE + code.replace("TOKEN", READ_TOKEN), dense, tmp_path)
    assert json.loads((tmp_path / "refusals.json").read_text()) == 4 * [401] + 4 * [403]
    assert before == (dict(repo.refs), len(repo.commits), set(client.hub.repos))
    assert (tmp_path / "saved" / "model.safetensors").exists()  # what was saved here stays


@pytest.mark.usefixtures("logits")
def test_without_hf_sparse_loading_fails_whatever_is_ignored_and_the_log_names_hf_sparse(
    client: Client,
) -> None:
    code = """
import sys
sys.modules["hf_sparse"] = None  # an import of it fails, as if it were not installed
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("me/tiny-sparse", ignore_mismatched_sizes=True)
"""
    done = client.run(code, imported=fresh.PLAIN)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert any("quantization type" in line and "hf_sparse" in line for line in lines)
    assert lines[-1].startswith("OSError: me/tiny-sparse does not appear to have a file named")


def test_save_pretrained_with_push_to_hub_saves_and_pushes_the_same_files(
    client: Client, dense: Path, tmp_path: Path
) -> None:
    code = """
import hf_sparse
model.save_pretrained(folder / "by-name", push_to_hub=True, repo_id="me/named", private=True)
model.save_pretrained(folder / "by-folder", push_to_hub=True)
"""
    client.check(PRUNE + code, dense, tmp_path)
    repos = client.hub.repos
    assert repos["me/named"].private
    assert not repos["me/by-folder"].private
    for folder, name in {
        "by-name": "me/named",
        "by-folder": "me/by-folder",
    }.items():
        pushed = repos[name].files()
        assert "model.safetensors" in pushed
        assert contents(read_files(tmp_path / folder)) == contents(pushed)
    assert b"hf_sparse" in repos["me/named"].files()["config.json"]


@pytest.mark.usefixtures("logits")
def test_the_hub_s_own_tools_read_a_pushed_repository(client: Client, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from huggingface_hub import get_safetensors_metadata, snapshot_download

folder = Path(sys.argv[1])
header = get_safetensors_metadata("me/tiny-sparse").files_metadata["model.safetensors"]
(folder / "layers.json").write_text(header.metadata["hf_sparse"])
snapshot_download("me/tiny-sparse", local_dir=folder / "copy")
"""
    client.check(code, tmp_path)
    assert len(json.loads((tmp_path / "layers.json").read_text())["layers"]) == LAYERS
    assert read_files(tmp_path / "copy") == client.hub.repos["me/tiny-sparse"].files()


def test_what_an_attention_has_learned_is_fetched_with_the_weights_token(
    client: Client, dense: Path, tmp_path: Path
) -> None:
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from hf_sparse import SparseConfig

given = {"method": "hs_routing", "block": 8, "key_block": 4, "keys": 8, "from_length": 0}
data = [torch.arange(3, 61), torch.arange(2, 60)]
config = SparseConfig(
    method="magnitude", attention=given, dataset=data, num_samples=2, seq_len=32
)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.push_to_hub("me/attention", private=True)
torch.save(model(torch.arange(3, 61).reshape(2, 29)).logits, sys.argv[2])
"""
    client.check(code, dense, tmp_path / "pushed.pt")
    assert "sparse_attention.safetensors" in client.hub.repos["me/attention"].files()
    other = Client(client.hub, tmp_path / "other")
    reported = "\nassert model.hf_quantizer.report is not None"
    out = tmp_path / "loaded.safetensors"
    found = other.logits("me/attention", out, then=reported, token=READ_TOKEN, HF_TOKEN="")
    assert torch.equal(found, torch.load(tmp_path / "pushed.pt"))
