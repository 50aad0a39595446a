"""Rows of a data set, with columns of images, sound, text or conversations -> model inputs.

The model's processor makes them. What a column holds is seen from its values, as `datasets`
decodes them:

- images: a PIL image or a list of them, handed on in RGB;
- audio: something with an "array" and its "sampling_rate";
- conversation: a list of dicts with "role" and "content", rendered by the chat template;
- text: a string.

What a processor takes is told by the parts that it was made of (an image processor, a feature
extractor, a tokenizer), or by the first parameter of its call if it is itself one of these. Each
of its inputs gets the one column of that kind; of several the one that is called like the input. A
conversation goes before a text. Other columns are left out.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.errors import CalibrationError

Row = Mapping[str, Any]

# What a processor's part takes, and the part's first parameter if it stands alone.
PARTS = {"image_processor": "images", "feature_extractor": "audio", "tokenizer": "text"}
FIRST_PARAMETERS = {
    "images": "images",
    "raw_speech": "audio",
    "raw_audio": "audio",
    "audio": "audio",
    "text": "text",
}
# Of several columns of one kind these are meant.
USUAL_NAMES = {
    "images": ("image", "images"),
    "audio": ("audio",),
    "text": ("text",),
    "conversation": ("messages",),
}


def column_kinds(row: Row) -> dict[str, str]:
    """What the columns of a row hold, without those that hold nothing for a processor."""
    kinds = {column: _kind(value) for column, value in row.items()}
    return {column: kind for column, kind in kinds.items() if kind}


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    values = value if isinstance(value, list) and value else [value]
    if all(map(_is_image, values)):
        return "images"
    if _is_sound(value):
        return "audio"
    if all(isinstance(v, Mapping) and {"role", "content"} <= set(v) for v in values):
        return "conversation"
    return None


def _is_image(value: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # whoever made an image has imported it
    return pillow is not None and isinstance(value, pillow.Image)


def _is_sound(value: Any) -> bool:
    if isinstance(value, Mapping):
        return {"array", "sampling_rate"} <= set(value)
    return hasattr(value, "get_all_samples")  # datasets' AudioDecoder, which has both as items


@dataclass(frozen=True)
class RowReader:
    """How the rows of a data set become inputs of a model.

    Attributes:
        processor: of transformers: a processor, or one part of one.
        columns: the column of each input, of "images", "audio" and "text", that has one.
        chat: is the column of the text a conversation?
    """

    processor: Any
    columns: Mapping[str, str]
    chat: bool

    @classmethod
    def of(cls, first: Row, processor: Any) -> RowReader:
        """Choose the columns that a processor is to get, by the first row.

        Raises:
            CalibrationError: there is no processor, none of the columns is for it, or several are
                for one of its inputs.
        """
        kinds = column_kinds(first)
        if processor is None:
            raise CalibrationError(
                f"the dataset's rows have {_described(kinds, first)}, and no processor came with "
                "the model: pass tokenizer= a processor, or dicts of model inputs"
            )
        wanted = inputs_of(processor)
        columns: dict[str, str] = {}
        chat = "text" in wanted and "conversation" in kinds.values()
        for name in wanted:
            kind = "conversation" if chat and name == "text" else name
            found = [column for column, held in kinds.items() if held == kind]
            usual = [column for column in found if column in USUAL_NAMES[kind]]
            if len(found) > 1 and len(usual) != 1:
                raise CalibrationError(
                    f"columns {' and '.join(map(repr, found))} of the dataset could all be the "
                    f"{name} of {type(processor).__name__}: call the right one "
                    f"{USUAL_NAMES[kind][0]!r}, or drop the others"
                )
            if found:
                columns[name] = (usual or found)[0]
        if not columns:
            raise CalibrationError(
                f"{type(processor).__name__} takes {' and '.join(wanted)}, the dataset's rows have "
                f"{_described(kinds, first)}: pass rows with a column of it, or another processor "
                "as tokenizer="
            )
        return cls(processor, columns, chat)

    @property
    def text_alone(self) -> bool:
        """Do the rows give text and nothing else?"""
        return set(self.columns) == {"text"}

    def text(self, row: Row, index: int) -> str:
        """A row's text."""
        value = self._value(row, "text", index)
        return self._rendered(value, index) if self.chat else str(value)

    def inputs(self, rows: Iterable[Row]) -> Iterator[Mapping[str, Any]]:
        """What the processor makes of each row.

        Raises:
            CalibrationError: a row lacks a column, has sound of another sampling rate, or the
                processor refuses it; names the row.
        """
        for index, row in enumerate(rows):
            arguments = self._arguments(row, index)
            try:
                alone = not any(hasattr(self.processor, part) for part in PARTS)
                if alone:
                    made = self.processor(arguments.popitem()[1], **self._settings())
                else:
                    made = self.processor(**arguments, **self._settings())
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
                raise CalibrationError(
                    f"{type(self.processor).__name__} can't process item {index} of the dataset "
                    f"(columns {', '.join(self.columns.values())}): {error}"
                ) from error
            yield {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}

    def _settings(self) -> dict[str, Any]:
        rate = {"sampling_rate": self._rate()} if "audio" in self.columns else {}
        return {"return_tensors": "pt", **rate}

    def _rate(self) -> int | None:
        part = getattr(self.processor, "feature_extractor", self.processor)
        return getattr(part, "sampling_rate", None)

    def _arguments(self, row: Row, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.columns:
            if name == "text":
                found[name] = [self.text(row, index)]
                continue
            value = self._value(row, name, index)
            if name == "images":
                images = value if isinstance(value, list) else [value]
                found[name] = [image.convert("RGB") for image in images]
            else:
                found[name] = [self._sound(value, index)]
        return found

    def _value(self, row: Row, name: str, index: int) -> Any:
        column = self.columns[name]
        value = row.get(column) if isinstance(row, Mapping) else None
        kind = "conversation" if name == "text" and self.chat else name
        if _kind(value) != kind:
            raise CalibrationError(
                f"item {index} of the dataset has a {type(value).__name__} in column {column!r}, "
                f"where the first one has {kind}: leave such rows out"
            )
        return value

    def _sound(self, value: Any, index: int) -> Any:
        found, wanted = value["sampling_rate"], self._rate()
        if wanted is not None and found != wanted:
            raise CalibrationError(
                f"item {index} of the dataset has sound of {found} Hz in column "
                f"{self.columns['audio']!r}, {type(self.processor).__name__} expects {wanted} Hz: "
                f"dataset.cast_column({self.columns['audio']!r}, Audio(sampling_rate={wanted})) "
                "resamples it"
            )
        return np.asarray(value["array"], dtype=np.float32)

    def _rendered(self, messages: Any, index: int) -> str:
        """A conversation as the chat template writes it."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        template = getattr(self.processor, "chat_template", None)
        source = self.processor if template else tokenizer
        try:
            text = source.apply_chat_template(messages, tokenize=False)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CalibrationError(
                f"item {index} of the dataset is a conversation, which "
                f"{type(self.processor).__name__} can't render: {error}"
            ) from error
        # The tokenizer, or what packs texts, opens a text with this token of its own.
        return str(text).removeprefix(getattr(tokenizer, "bos_token", None) or "")


def inputs_of(processor: Any) -> list[str]:
    """Which of "images", "audio" and "text" a processor takes.

    Raises:
        CalibrationError: the object is no processor.
    """
    parts = [name for part, name in PARTS.items() if getattr(processor, part, None) is not None]
    if parts:
        return parts
    first = next(iter(inspect.signature(processor).parameters), "") if callable(processor) else ""
    if first not in FIRST_PARAMETERS:
        raise CalibrationError(
            f"tokenizer={type(processor).__name__} is neither a processor nor a tokenizer: pass "
            "what AutoProcessor.from_pretrained gives"
        )
    return [FIRST_PARAMETERS[first]]


def _described(kinds: Mapping[str, str], row: Row) -> str:
    return ", ".join(
        f"{column!r} ({kinds.get(column, type(value).__name__)})" for column, value in row.items()
    )
