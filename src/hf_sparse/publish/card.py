"""The model card of a sparse model: metadata for the Hub, and text for people.

Every number comes from the pruning report and the evaluation that the model's quantizer holds, but
zeros are counted in the weight files; what was not measured is not in the card.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from ..config.sparse_config import SparseConfig
from ..core.data_record import DataRecord
from ..evaluation import Evaluation
from ..pruning.report import PruningReport
from .card_results import eval_results
from .card_values import Subject, card_values
from .counted import counted
from .hub_files import CARD, INHERITED, hub_id, inherited, read_card

TEMPLATE = files(__package__) / "card_template.md"
MARK = (
    "<!-- Written by hf_sparse from the model's pruning report, and written anew whenever the "
    "model is saved: delete this line to make the card your own. -->"
)
# transformers says so in the card that it makes up where there is none.
MADE_UP = "This model card has been automatically generated."
# The Hub knows adapter, finetune, merge and quantized, the last for weights in another form.
RELATION = "quantized"


def is_own_card(path: Path) -> bool:
    """Is there a card that somebody wrote: with a text, and neither from here nor made up?"""
    if path.name != CARD or not path.is_file():
        return False
    card = read_card(path)
    if card is None:
        return True  # there is something that can't be read
    return bool(card.text.strip()) and MARK not in card.text and MADE_UP not in card.text


def model_card(
    model: Any, folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()
) -> ModelCard:
    """The card of a sparse model whose files are in a folder.

    Args:
        model: the model.
        folder: where its weights, and perhaps its tokenizer, have been written.
        repo_id: where it is pushed to; None if it stays in a folder.
        tags: beside the card's own.
    """
    source = str(model.name_or_path or "")
    given = inherited(source)
    subject = _subject(model, folder, source, given.pop("base_model", None), repo_id)
    results = eval_results(subject.evaluation)
    data = ModelCardData(
        **{"pipeline_tag": _task(model)} | given,
        base_model=subject.base,
        base_model_relation=RELATION if subject.base else None,
        library_name="transformers",
        tags=[*_tags(subject), *tags],
        eval_results=results or None,
        model_name=subject.name if results else None,
    )
    return fill_template(data, subject)


def fill_template(data: ModelCardData, subject: Subject) -> ModelCard:
    """The card with its metadata; whatever a string of the subject says, it is but text there."""
    text = TEMPLATE.read_text(encoding="utf-8")
    values = card_values(subject)
    card: ModelCard = ModelCard.from_template(data, template_str=text, mark=MARK, **values)
    return card


def write_card(card: ModelCard, folder: Path, existing: Path | None) -> None:
    """Write a card into a folder that is to be pushed to a repository that may have one already.

    A card that somebody wrote stays, and gets the new one's tags, as with transformers. One without
    text, or one that transformers made up, gives its licence, language and task to the new one.
    """
    found = read_card(existing)
    if existing is not None and is_own_card(existing):
        if found is None:
            (folder / CARD).unlink()
            return
        tags = [*found.data.get("tags", []), *card.data.get("tags")]
        found.data["tags"] = list(dict.fromkeys(tags))
        card = found
    elif found is not None and MARK not in found.text:
        for key in INHERITED:
            if found.data.get(key) is not None:
                card.data[key] = found.data[key]
    card.save(folder / CARD)


def _subject(
    model: Any, folder: Path, source: str, named_base: Any, repo_id: str | None
) -> Subject:
    quantizer = model.hf_quantizer
    made: PruningReport | None = quantizer.report
    report = counted(made, folder) if made else None
    config: SparseConfig = quantizer.quantization_config
    made_from = report.model if report else ""
    base = hub_id(made_from) if "/" in made_from or made_from == hub_id(source) else None
    if quantizer.pre_quantized and isinstance(named_base, str):
        base = hub_id(named_base)
    base_name = base or made_from
    name = (repo_id or "").rpartition("/")[2] or _name(base_name, report)
    return Subject(
        name=name,
        address=repo_id or name,
        base=base,
        base_name=base_name,
        model_class=type(model).__name__,
        has_tokenizer=any(folder.glob("tokenizer*")),
        settings=config.to_dict(),
        defaults=SparseConfig(method=config.method).to_dict(),
        data=config.dataset if isinstance(config.dataset, DataRecord) else None,
        report=report,
        evaluation=quantizer.evaluation or Evaluation(),
        weight_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        plain=report is not None and bool(report.experts) and not report.layers,
    )


def _tags(subject: Subject) -> list[str]:
    how = ["pruned"] if subject.plain else ["sparse", "pruned", subject.settings["method"]]
    return ["hf_sparse", *how]


def _name(base_name: str, report: PruningReport | None) -> str:
    base = base_name.rpartition("/")[2] or "model"
    if report and report.experts and not report.layers:
        return f"{base}-fewer-experts"
    return f"{base}-sparse{round(100 * report.sparsity)}" if report else f"{base}-sparse"


def _task(model: Any) -> str | None:
    """The Hub's name for what a model of this class does."""
    name = type(model).__name__
    known = (task for task, classes in TASK_MAPPING.items() if name in _flat(classes.values()))
    return next(known, None)


def _flat(names: Iterable[Any]) -> set[str]:
    return {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}
