"""What an item of calibration data is: text, token ids, model inputs, or a row for a processor.

It is decided here, once; all else goes by an item's kind. What a column of a row holds is seen from
its value, as `datasets` decodes it:

- images: a PIL image or a list of them;
- audio: something with an "array" and its "sampling_rate";
- conversation: a list of dicts with "role" and "content", or ShareGPT's "from" and "value";
- text: a string.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any

from torch import Tensor

Row = Mapping[str, Any]

SAYS = ({"role", "content"}, {"from", "value"})
# A row with these columns is a conversation of two: what is asked (and more of it), what is said.
DIALOGUES = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
)


class Kind(Enum):
    """What becomes of an item.

    TEXT is a string, or a row whose text is in its column "text" or its only one; INPUTS is a dict
    of model inputs; ROW is for the processor; IDS is one sample of token ids, or nothing known;
    BLANK is text or a row with nothing in it.
    """

    TEXT = auto()
    ROW = auto()
    INPUTS = auto()
    IDS = auto()
    BLANK = auto()


@dataclass(frozen=True)
class Item:
    """One of the things that a dataset consists of.

    Attributes:
        index: its place in what the user passed, for messages.
        value: itself.
    """

    index: int
    value: Any

    @cached_property
    def kind(self) -> Kind:
        return kind_of(self.value)

    @property
    def text(self) -> str | None:
        """The text of one that is TEXT or BLANK, else None."""
        if self.kind is Kind.BLANK:
            return ""
        return str(_text_of(self.value)) if self.kind is Kind.TEXT else None

    @property
    def is_textual(self) -> bool:
        """Will it become text, of which a sample may take several, or a part of one?"""
        if self.kind is Kind.ROW:
            return not {"images", "audio"} & set(column_kinds(self.value).values())
        return self.kind is Kind.TEXT


def kind_of(value: Any) -> Kind:
    """The kind of an item, told by its value alone."""
    if value is None or isinstance(value, str):
        return Kind.TEXT if value and not value.isspace() else Kind.BLANK
    if not isinstance(value, Mapping):
        return Kind.IDS
    if "input_ids" in value:
        return Kind.INPUTS
    text, tensors = _text_of(value), any(isinstance(v, Tensor) for v in value.values())
    kinds = set() if tensors else set(column_kinds(value).values())
    if not kinds - {"text"} and (isinstance(text, str) or (text is None and "text" in value)):
        return Kind.TEXT if text and not text.isspace() else Kind.BLANK
    if kinds:
        return Kind.ROW
    return Kind.BLANK if _has_nothing(value) else Kind.INPUTS


def column_kinds(row: Row) -> dict[str, str]:
    """What the columns of a row hold, without those that hold nothing for a processor."""
    kinds = {column: value_kind(value) for column, value in row.items()}
    return {column: kind for column, kind in kinds.items() if kind}


def value_kind(value: Any) -> str | None:
    """What a column's value is: "images", "audio", "text", "conversation" or None."""
    if isinstance(value, str):
        return "text"
    values = value if isinstance(value, list) and value else [value]
    if all(map(_is_image, values)):
        return "images"
    if _is_sound(value):
        return "audio"
    if all(isinstance(v, Mapping) and any(keys <= set(v) for keys in SAYS) for v in values):
        return "conversation"
    return None


def dialogue_of(row: Row) -> tuple[str, ...] | None:
    """The columns of a row that are a conversation of two, as in Alpaca; None if it is none."""
    for columns in DIALOGUES:
        found = tuple(c for c in columns if isinstance(row.get(c), str))
        if {columns[0], columns[-1]} <= set(found):
            return found
    return None


def _text_of(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if "text" in value:
        return value["text"]
    return next(iter(value.values())) if len(value) == 1 else None


def _has_nothing(row: Row) -> bool:
    """Is a column empty where others may hold something, and no other one a list of numbers?"""
    empty = [value is None or value == [] for value in row.values()]
    return any(empty) and not any(isinstance(v, list) and v for v in row.values())


def _is_image(value: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # whoever made an image has imported it
    return pillow is not None and isinstance(value, pillow.Image)


def _is_sound(value: Any) -> bool:
    if isinstance(value, Mapping):
        return {"array", "sampling_rate"} <= set(value)
    return hasattr(value, "get_all_samples")  # datasets' AudioDecoder, which has both as items
