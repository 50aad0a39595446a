"""Model cards without a Hub: what is in them, and whose card a card is."""

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.publish.card import MARK, is_own_card
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


def test_a_report_of_somebody_else_can_not_break_the_card(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "pruning_report.json"
    found = sparse.hf_quantizer.report.environment.processor
    path.write_text(path.read_text().replace(found, "x | y\\n\\n# Buy", 1))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    card = saved_card(loaded, tmp_path / "b")
    assert "x \\| y # Buy (" in card.text
    assert "\n# Buy" not in card.text


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
