"""What comes with a push: tokenizer, reports and model card; pushes that break off or are refused.

With the real client, over HTTP, in processes of their own.
"""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hub_client import Client
from hub_server import READ_TOKEN, Files, Hub, Repo, card_errors, serve
from huggingface_hub import ModelCard
from tiny_models import tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from conftest import ROOT

BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language:
- en
- de
pipeline_tag: text-generation
tags:
- not-to-be-taken-over
---

# The dense model
"""
WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(58))]

# Prunes org/base; names that the tests below use.
PRUNE = """
import json, sys, torch
from pathlib import Path
import hf_sparse
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
text = [" ".join(f"w{(7 * i + j) % 58}" for j in range(40)) for i in range(8)]
model = AutoModelForCausalLM.from_pretrained(
    "org/base",
    quantization_config=hf_sparse.SparseConfig(
        method="wanda", sparsity=0.6, dataset=text, num_samples=8, seq_len=32, seed=3
    ),
)

def refused(push, *args, **kwargs):
    try:
        push(*args, **kwargs)
    except hf_sparse.HubError as error:
        assert error.__cause__ is not None
        return str(error)
"""


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def card_of(hub: Hub, name: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[name].files(revision)["README.md"].decode())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with a dense model, org/base, and its tokenizer."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(vocab_size=len(WORDS)).save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    (folder / "README.md").write_text(BASE_CARD)
    with serve() as running:
        running.repos["org/base"] = Repo(private=False)
        running.repos["org/base"].commit("main", files_of(folder))
        yield running


@pytest.fixture(scope="module")
def pushed(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a process saved that pushed me/sparse, me/own, me/web and me/shards."""
    for name, card in {
        "me/own": "---\nlicense: mit\ntags:\n- mine\n---\n\nWhat I say of it.\n",
        "me/web": "---\nlicense: apache-2.0\n---\n",
        "me/broken": "---\nlicense: [\n---\n\nMine.\n",
    }.items():
        hub.repos[name] = Repo(private=False)
        hub.repos[name].commit("main", {"README.md": card.encode(), "notes.txt": b"mine"})
    folder = tmp_path_factory.mktemp("pushed")
    code = """
dense = AutoModelForCausalLM.from_pretrained("org/base")
tokenizer = AutoTokenizer.from_pretrained("org/base")
model.hf_quantizer.evaluation = hf_sparse.evaluate(
    model, dense, tokenizer, text, seq_len=32, num_samples=4, new_tokens=4
)
(folder / "evaluation.json").write_text(json.dumps(model.hf_quantizer.evaluation.to_dict()))
model.push_to_hub(
    "me/sparse", commit_message="First", commit_description="In words", tags=["mine"]
)
model.push_to_hub("me/shards", max_shard_size="20KB")
model.push_to_hub("me/shards")
model.hf_quantizer.evaluation = None
for name in ("me/own", "me/web", "me/broken"):
    model.push_to_hub(name)
model.save_pretrained(folder / "saved")
"""
    Client(hub, folder / "home").check(PRUNE + code, folder)
    return folder


@pytest.mark.usefixtures("pushed")
def test_a_push_is_one_commit_with_weights_configs_tokenizer_reports_and_card(hub: Hub) -> None:
    repo = hub.repos["me/sparse"]
    assert set(repo.files()) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pruning_evaluation.json",
        "pruning_report.html",
        "pruning_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len(repo.commits) == 2  # the repository's creation is the other one
    assert repo.messages[repo.refs["main"]] == ("First", "In words")
    original = hub.repos["org/base"].files()["tokenizer.json"]
    assert json.loads(repo.files()["tokenizer.json"]) == json.loads(original)


def test_the_card_s_metadata_are_the_base_s_and_the_evaluation_s(hub: Hub, pushed: Path) -> None:
    card = card_of(hub, "me/sparse")
    data = card.data.to_dict()
    assert card_errors(data) == []
    measured = json.loads((pushed / "evaluation.json").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    expected = {
        "perplexity": measured["perplexity"]["perplexity"],
        "kl_divergence": measured["agreement"]["kl_divergence"],
        "top1_agreement": measured["agreement"]["top1"],
    }
    assert {kind: result.metric_value for kind, result in results.items()} == expected
    assert results["perplexity"].dataset_args["sha256"] == measured["perplexity"]["data"]["digest"]
    del data["model-index"]
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": f"{hub.url}/org/base/blob/main/LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["hf_sparse", "sparse", "pruned", "wanda", "mine"],
    }
    assert card.data.model_name == "sparse"


def test_the_card_s_numbers_are_the_report_s(hub: Hub, pushed: Path) -> None:
    files = hub.repos["me/sparse"].files()
    report = json.loads(files["pruning_report.json"])
    speed = json.loads((pushed / "evaluation.json").read_text())["speed"]
    text = card_of(hub, "me/sparse").text
    errors = [layer["relative_error"] for layer in report["layers"]]
    for line in (
        "| method | `wanda` |",
        f"| sparsity reached | {report['sparsity']:.4f} |",
        "| calibration data | `list`, 8 samples, 256 tokens |",
        f"| SHA-256 of the data | `{report['data']['digest']}` |",
        "| seed | 3 |",
        "| other settings | `num_samples=8`, `seq_len=32` |",
        f"mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f} (`",
        f"hf_sparse {version('hf_sparse')}",
        f"torch {torch.__version__}",
        f"{report['bytes_before'] / 1e6:.2f} MB",
        f"| all weight files |  | {len(files['model.safetensors']) / 1e6:.2f} MB |",
        f"| {speed['tokens_per_second']:.1f} | {speed['machine']} |",
        report["date"],
        "pip install hf-sparse",
        'LlamaForCausalLM.from_pretrained("me/sparse")',
    ):
        assert line in text, line
    assert "was not measured" not in text


@pytest.mark.usefixtures("pushed")
def test_what_was_not_measured_is_not_in_the_card(hub: Hub) -> None:
    card = card_of(hub, "me/web")
    assert card.data.eval_results is None
    assert "model-index" not in card.data.to_dict()
    assert "## Results" not in card.text
    assert "## Speed" not in card.text
    assert "Its quality was not measured" in card.text
    assert "pruning_evaluation.json" not in hub.repos["me/web"].files()


@pytest.mark.usefixtures("pushed")
def test_a_card_that_someone_wrote_stays_and_gets_tags(hub: Hub) -> None:
    card = card_of(hub, "me/own")
    assert card.text.strip() == "What I say of it."
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "hf_sparse", "sparse", "pruned", "wanda"]
    # One that holds no YAML can't be completed.
    assert hub.repos["me/broken"].files()["README.md"].endswith(b"Mine.\n")
    assert "model.safetensors" in hub.repos["me/broken"].files()
    # One without a text, as the Hub's form makes it, is completed; its licence was chosen.
    assert card_of(hub, "me/web").data.license == "apache-2.0"
    assert "# web" in card_of(hub, "me/web").text
    assert hub.repos["me/web"].files()["notes.txt"] == b"mine"


@pytest.mark.usefixtures("pushed")
def test_a_push_with_other_shards_leaves_none_of_the_former_ones(hub: Hub) -> None:
    repo = hub.repos["me/shards"]
    before, after = repo.commits[next(reversed(list(repo.commits)[:-1]))], repo.files()
    assert sum(path.endswith(".safetensors") for path in before) > 1
    assert [path for path in after if path.startswith("model")] == ["model.safetensors"]


def test_a_saved_folder_has_the_same_card(hub: Hub, pushed: Path) -> None:
    card = ModelCard.load(pushed / "saved" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.license_name == "tiny-licence"
    report = json.loads((pushed / "saved" / "pruning_report.json").read_text())
    assert f"# base-sparse{round(100 * report['sparsity'])}\n" in card.text
    web = card_of(hub, "me/web").text
    assert card.text.split("## How it was made")[1] == web.split("## How it was made")[1]


def test_what_is_loaded_by_id_can_be_pushed_again(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")
    online = client.logits(
        "me/sparse", tmp_path / "a.safetensors", then='model.push_to_hub("me/copy")'
    )
    asked = len(hub.requests)
    offline = client.logits("me/sparse", tmp_path / "b.safetensors", HF_HUB_OFFLINE="1")
    assert torch.equal(online, offline)
    assert len(hub.requests) == asked
    first, copy = hub.repos["me/sparse"].files(), hub.repos["me/copy"].files()
    for name in ("model.safetensors", "pruning_report.json", "tokenizer.json"):
        assert copy[name] == first[name]
    card = card_of(hub, "me/copy")
    assert card.data.base_model == "org/base"
    assert card.data.license_name == "tiny-licence"
    # The evaluation was of the model that was pushed first: this one may have been trained since.
    assert card.data.eval_results is None


def test_a_push_that_breaks_off_is_completed_by_the_next_one(hub: Hub, tmp_path: Path) -> None:
    code = """
said = [refused(model.push_to_hub, "me/again", max_shard_size="20KB") for _ in range(2)]
model.push_to_hub("me/again", max_shard_size="20KB")
(folder / "said.json").write_text(json.dumps(said))
"""
    hub.uploaded.clear()
    hub.failures["POST /api/models/me/again/preupload/main"] = 500  # the client repeats that
    hub.failures["PUT /lfs/[0-9a-f]+"] = 400
    hub.failures["POST /api/models/me/again/commit/main"] = None
    asked = len(hub.requests)
    Client(hub, tmp_path / "home").check(PRUNE + code, tmp_path)
    assert hub.failures == {}
    said = json.loads((tmp_path / "said.json").read_text())
    assert "the Hub refused it" in said[0]
    assert "push again when it is back, files that arrived are not sent twice" in said[1]
    repo = hub.repos["me/again"]
    assert len(repo.commits) == 2
    assert sum(path.endswith(".safetensors") for path in repo.files()) > 1
    arrived = [request for request in hub.requests[asked:] if request.startswith("PUT /lfs/")]
    assert len(arrived) == len(set(arrived)) > 1


def test_a_refused_push_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.repos["you/theirs"] = Repo(private=False)
    hub.repos["you/theirs"].commit("main", {"README.md": b"---\nlicense: mit\n---\n\nTheirs.\n"})
    code = """
import os
said = {
    "expired": refused(model.push_to_hub, "me/x", token="hf_expired"),
    "read": refused(model.push_to_hub, "me/x", token="READ"),
    "theirs": refused(model.push_to_hub, "you/theirs"),
    "name": refused(model.push_to_hub, "me/x/y"),
}
model.push_to_hub("you/theirs", create_pr=True)
os.environ.pop("HF_TOKEN")
said["none"] = refused(model.push_to_hub, "me/x")
import huggingface_hub
said["unreachable"] = refused(model.push_to_hub, "me/x", token="hf_write") if (
    setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9") or True
) else None
huggingface_hub.constants.HF_HUB_OFFLINE = True
huggingface_hub.close_session()
said["offline"] = refused(model.push_to_hub, "me/x", token="hf_write")
(folder / "said.json").write_text(json.dumps(said))
"""
    Client(hub, tmp_path / "home").check(PRUNE + code.replace("READ", READ_TOKEN), tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    expected = {
        "expired": "the Hub refused the token, it is wrong or has expired: run `hf auth login`",
        "read": "the repository isn't yours, or the token may not write to it",
        "theirs": "can't push to 'you/theirs': the repository isn't yours, or the token may not",
        "name": "that is no name of a repository, pass 'you/name'",
        "none": "there is no Hub token: run `hf auth login`, set HF_TOKEN or pass token=",
        "unreachable": "the Hub can't be reached, or the connection broke off",
        "offline": "HF_HUB_OFFLINE is set: unset it, or save to a folder and push later",
    }
    for case, words in expected.items():
        assert words in said[case], case
        assert "\n" not in said[case]
    assert "me/x" not in hub.repos
    repo = hub.repos["you/theirs"]
    assert set(repo.files()) == {"README.md"}
    assert "model.safetensors" in repo.files("refs/pr/1")
    assert card_of(hub, "you/theirs", "refs/pr/1").text.strip() == "Theirs."


def test_the_page_of_the_docs_and_the_example_run(
    hub: Hub, tmp_path: Path, short_examples: Path
) -> None:
    """In the project's folder, as somebody would type them."""
    client = Client(hub, tmp_path / "home")
    (tmp_path / "examples").symlink_to(short_examples)
    page = (ROOT / "docs" / "sharing.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    client.check("import os, sys; os.chdir(sys.argv[1])\n" + "\n".join(blocks), tmp_path)
    repo = hub.repos["me/tiny-llama-sparse50"]
    assert {"pruning_evaluation.json", "tokenizer.json"} < set(repo.files())
    assert ("With an evaluation", "") in repo.messages.values()
    assert (tmp_path / "tiny-llama-sparse50" / "README.md").is_file()

    arguments = [
        *(short_examples / "models" / "tiny-llama-docs", "me/example", "--private"),
        *("--calibration", short_examples / "data" / "calibration.txt", "--num-samples", 8),
        *("--evaluation", short_examples / "data" / "evaluation.txt", "--seq-len", 128),
        *("--evaluation-samples", 8),
    ]
    example = (ROOT / "examples" / "prune_and_push.py").read_text()
    assert example.count("\n") <= 60
    done = client.run(example, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/example/commit/" in done.stdout
    assert hub.repos["me/example"].private
    data = card_of(hub, "me/example").data
    assert data.eval_results[0].dataset_name == "evaluation.txt"
    assert data.base_model is None  # it is in a folder, and on no Hub
