"""Model cards without a Hub: what is in them, and whose card a card is."""

import ast
import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import layer_report
from hf_sparse import PruningReport, SparseConfig
from hf_sparse.core.data_record import DataRecord
from hf_sparse.evaluation import Agreement, Evaluation, GenerationSpeed, Perplexity
from hf_sparse.kernels.machine import Environment
from hf_sparse.publish.card import MARK, fill_template, is_own_card
from hf_sparse.publish.card_results import eval_results
from hf_sparse.publish.card_values import Subject
from hf_sparse.publish.counted import counted
from hf_sparse.publish.hub_files import hub_id

MADE_UP = ModelCard.from_template(
    ModelCardData(),
    model_description="This is the model card of a 🤗 transformers model that has been pushed on "
    "the Hub. This model card has been automatically generated.",
)


@pytest.fixture
def sparse(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity={"mlp": 0.75}, seed=5))
    return tiny


def saved_card(model, folder) -> ModelCard:
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_a_model_of_no_hub_has_no_base_model(sparse, tmp_path):
    card = saved_card(sparse, tmp_path)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_sparse", "sparse", "pruned", "magnitude"],
    }
    assert "| sparsity asked for | `mlp`: 0.75 |" in card.text
    assert "| sparsity reached | 0.7500 |" in card.text
    assert "| calibration data | none |" in card.text
    assert "relative error" not in card.text  # without data there is none
    assert "AutoTokenizer" not in card.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 8, "group_size": 8}, "and the others rounded to 8 bits"),
        ({"low_rank": 2, "dataset": "ids", "num_samples": 4}, "beside a part of rank 2"),
    ],
)
def test_the_summary_says_what_else_was_done(tiny, token_ids, tmp_path, settings, words):
    settings = {k: list(token_ids) if v == "ids" else v for k, v in settings.items()}
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", **settings))
    assert words in saved_card(tiny, tmp_path).text


# What a stranger's report or config may say anywhere.
NASTY = [
    'x"); import os; os.system("id")  # ',
    "x\n```\n\n# Buy",
    "<script>alert(1)</script>",
    "[click](https://elsewhere.example) ![](//elsewhere.example/p.png)",
    "https://elsewhere.example",
    "| a | b \\| c |",
    "`code` ``|``",
    "---\nlicense: mit\n---",
    "{{ mark }}{% raw %}",
    "\x1b[31m\u202e",
    "\ud800",
]


def card_with(text: str, base: str | None = None) -> str:
    """A card every string of which is the text."""
    data = DataRecord(text, digest=text, count=3, tokens=7)
    machine = Environment(text, 1, 1, text, text, text, {text: text})
    speed = GenerationSpeed(5, 6, 0.1, 0.2, 7, 8, text)
    measured = Perplexity(2.0, 0.7, 9, 1, 4, None, data)
    settings = {
        "method": text,
        "sparsity": [[text, 0.5]],
        "pattern": text,
        "seed": 0,
        "targets": [text],
        text: text,
    }
    report = PruningReport(
        (layer_report(text),), {text: text}, data, 1.0, {}, text, {}, machine, text
    )
    evaluation = Evaluation(measured, measured, Agreement(0.1, 0.9, 9, 4, data), speed, speed)
    subject = Subject(
        text, text, base, text, "LlamaForCausalLM", True, settings, {}, data, report, evaluation, 1
    )
    metadata = ModelCardData(eval_results=eval_results(evaluation), model_name=text)
    return str(fill_template(metadata, subject))


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_what_somebody_else_wrote_stands_in_the_card_and_does_nothing_there(text, tmp_path):
    card, plain = card_with(text), card_with("plain")
    path = tmp_path / "README.md"
    ModelCard(card).save(path)  # also what can't be encoded
    written = ModelCard.load(path)
    expected = ModelCard(plain).data.to_dict()
    assert written.data.to_dict().keys() == expected.keys()
    lines, plain_lines = written.text.splitlines(), ModelCard(plain).text.splitlines()
    assert len(lines) == len(plain_lines)
    for line, plain_line in zip(lines, plain_lines, strict=True):
        bars, plain_bars = (len(re.findall(r"(?<!\\)\|", x)) for x in (line, plain_line))
        assert bars == plain_bars or "from_pretrained" in line, line
    (code,) = re.findall(r"```python\n(.*?)\n```\n", written.text, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [text, text]
    outside = written.text.replace(code, "").replace(MARK, "")
    outside = re.sub("(`+) ?(.*?) ?\\1(?!`)", "", outside)  # what stands as code
    assert set(re.findall("<.*?>", outside)) <= {"<code>", "</code>"}
    assert not re.findall(r"(?<!\\)\]\(|(?<!\\)://", outside)


def test_zeros_are_those_of_the_files_whatever_the_report_says(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "pruning_report.json"
    report = json.loads(path.read_text())
    first, *others = report["layers"]
    first |= {"zeros": first["shape"][0] * first["shape"][1], "sparsity": 1.0}
    missing = {**first, "name": "model.layers.7.mlp.up_proj"}
    path.write_text(json.dumps(report | {"layers": [first, *others, missing]}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    text = saved_card(loaded, tmp_path / "b").text
    assert f"75.0% of the weights of {len(report['layers'])} layers" in text
    assert "| sparsity reached | 0.7500 |" in text


@pytest.mark.parametrize("bits", [None, 4])
def test_bytes_and_zeros_are_counted_in_the_files(tiny, token_ids, tmp_path, bits):
    settings = {"method": "sparsegpt", "dataset": list(token_ids), "bits": bits, "low_rank": 2}
    made = hf_sparse.prune(tiny, SparseConfig(**settings if bits else {"method": "magnitude"}))
    tiny.save_pretrained(tmp_path)
    wrong = [replace(layer, bytes_after=7, zeros=1, sparsity=0.0) for layer in made.layers]
    found = counted(replace(made, layers=tuple(wrong)), tmp_path)
    for before, after in zip(made.layers, found.layers, strict=True):
        assert after == before
    tensors = load_file(tmp_path / "model.safetensors")
    names = tuple(f"{layer.name}.weight" for layer in made.layers)
    assert found.bytes_after == sum(t.nbytes for k, t in tensors.items() if k.startswith(names))


def test_a_base_model_that_is_no_repository_is_no_link(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "pruning_report.json"
    report = json.loads(path.read_text())
    for name in ("org/base](https://elsewhere.example) [", 'x"); import os  #', "org/base\n"):
        path.write_text(json.dumps(report | {"model": name}))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
        card = saved_card(loaded, tmp_path / "b")
        assert card.data.base_model is None
        assert "huggingface.co" not in card.text


@pytest.mark.parametrize(
    "metadata",
    [
        "license: 'x\n\n  ---'",
        "license: {a: b}",
        'license: "\\ud800"',
        "license: 2020-01-01",
        "license: " + 5000 * "[",
        "1: 2",
        "license: !!python/object/apply:os.getcwd []",
    ],
    ids=lambda text: text[:20],
)
def test_metadata_of_a_base_that_are_no_text_are_left_out(sparse, tmp_path, metadata, caplog):
    sparse.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text(f"---\n{metadata}\n---\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert saved_card(loaded, tmp_path / "b").data.license is None
    assert "\n" not in caplog.text.rstrip("\n")


def test_without_a_report_the_card_tells_what_the_config_tells(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "pruning_report.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    text = saved_card(loaded, tmp_path / "b").text
    assert "| seed | 5 |" in text
    assert "sparsity reached" not in text
    assert "| time |" not in text


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("---\nlicense: mit\n---\n\nMine.\n", True),
        ("Mine, without metadata.\n", True),
        ("---\nlicense: [\n---\nMine.\n", True),
        ("---\nlicense: mit\n---\n", False),
        (f"---\nlicense: mit\n---\n\n{MARK}\n\nMade here.\n", False),
        (str(MADE_UP), False),
    ],
)
def test_a_card_with_a_text_is_somebody_s_unless_it_was_made_up(tmp_path, text, own):
    path = tmp_path / "README.md"
    path.write_text(text)
    assert is_own_card(path) is own


def test_transformers_still_calls_its_card_made_up():
    import inspect

    from transformers.utils import hub

    assert "This model card has been automatically generated." in inspect.getsource(hub)


def test_saving_writes_its_own_card_anew_and_leaves_somebody_s(sparse, tmp_path):
    path = tmp_path / "README.md"
    first = str(saved_card(sparse, tmp_path))
    path.write_text(first.replace("## Limits", "## Old limits"))
    assert str(saved_card(sparse, tmp_path)) == first
    mine = first.replace(MARK, "")
    path.write_text(mine)
    sparse.save_pretrained(tmp_path)
    assert path.read_text() == mine


def test_a_hub_id_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert hub_id("org/model") == "org/model"
    assert hub_id("gpt2") == "gpt2"
    for text in ("", "here/model", str(tmp_path), "../model", "a/b/c"):
        assert hub_id(text) is None, text
