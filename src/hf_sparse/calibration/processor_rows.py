"""Rows of a data set, with columns of images, sound, text or conversations -> model inputs.

The model's processor makes them of images in RGB, of sound, of text, and of conversations as the
chat template writes them. What a processor takes is told by the parts that it was made of (an image
processor, a feature extractor, a tokenizer), or by the first parameter of its call if it is itself
one of these. Each of its inputs gets the one column of that kind; of several the one that is called
like the input. A conversation goes before a text; so do columns that make one, as "instruction"
(with "input") and "output" (`items.DIALOGUES`). Other columns are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.errors import CalibrationError
from .items import Item, Row, column_kinds, dialogue_of, value_kind

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
# ShareGPT's names for who speaks.
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class RowReader:
    """How the rows of a data set become inputs of a model.

    Attributes:
        processor: of transformers: a processor, or one part of one.
        columns: the column of each input, of "images", "audio" and "text", that has one.
        chat: is the column of the text a conversation?
        dialogue: the columns that are a conversation of two, if the text is one.
    """

    processor: Any
    columns: Mapping[str, str]
    chat: bool
    dialogue: tuple[str, ...] | None = None

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
        dialogue = None if chat or "text" not in wanted else dialogue_of(first)
        for name in wanted:
            if name == "text" and dialogue:
                columns[name] = " and ".join(dialogue)
                continue
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
        return cls(processor, columns, chat, dialogue)

    @property
    def text_alone(self) -> bool:
        """Do the rows give text and nothing else?"""
        return set(self.columns) == {"text"}

    def texts(self, rows: Iterable[Item]) -> Iterator[tuple[int, str]]:
        """The text of each row, "" of one with nothing in it, and the row's place."""
        for row in rows:
            yield row.index, self._text(row)

    def inputs(self, rows: Iterable[Item]) -> Iterator[dict[str, torch.Tensor]]:
        """What the processor makes of each row.

        Raises:
            CalibrationError: a row lacks a column, has sound of another sampling rate, or the
                processor refuses it; names the row.
        """
        for row in rows:
            try:
                arguments = {name: self._argument(row, name) for name in self.columns}
                alone = not any(hasattr(self.processor, part) for part in PARTS)
                if alone:
                    made = self.processor(arguments.popitem()[1], **self._settings())
                else:
                    made = self.processor(**arguments, **self._settings())
            except CalibrationError:
                raise
            except Exception as error:  # of whatever decodes the image or sound, or processes it
                raise CalibrationError(
                    f"{type(self.processor).__name__} can't process item {row.index} of the "
                    f"dataset (columns {', '.join(self.columns.values())}): {error}"
                ) from error
            yield {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}

    def _settings(self) -> dict[str, Any]:
        rate = {"sampling_rate": self._rate()} if "audio" in self.columns else {}
        return {"return_tensors": "pt", **rate}

    def _rate(self) -> int | None:
        part = getattr(self.processor, "feature_extractor", self.processor)
        return getattr(part, "sampling_rate", None)

    def _argument(self, row: Item, name: str) -> list[Any]:
        if name == "text":
            return [self._text(row)]
        value = self._value(row, name)
        if name == "audio":
            return [self._sound(value, row.index)]
        return [image.convert("RGB") for image in (value if isinstance(value, list) else [value])]

    def _value(self, row: Item, name: str) -> Any:
        column = self.columns[name]
        value = row.value.get(column) if isinstance(row.value, Mapping) else None
        kind = "conversation" if name == "text" and self.chat else name
        if value_kind(value) != kind:
            raise CalibrationError(
                f"item {row.index} of the dataset has a {type(value).__name__} in column "
                f"{column!r}, where the first one has {kind}: leave such rows out"
            )
        return value

    def _text(self, row: Item) -> str:
        if self.dialogue:
            return self._dialogue(row)
        empty = isinstance(row.value, Mapping) and self.columns["text"] in row.value
        if empty and row.value[self.columns["text"]] in (None, "", []):
            return ""
        value = self._value(row, "text")
        return self._rendered(value, row.index) if self.chat else str(value)

    def _dialogue(self, row: Item) -> str:
        """A conversation of two as the chat template writes it, or else its parts in a row."""
        found = dialogue_of(row.value) if isinstance(row.value, Mapping) else None
        if not found:
            raise CalibrationError(
                f"item {row.index} of the dataset has no text in its columns "
                f"{self.columns['text']}, as the first one has: leave such rows out"
            )
        *asked, answer = (row.value[column] for column in found)
        question = "\n\n".join(part for part in asked if part)
        if not (question + answer).strip():
            return ""
        if not getattr(self._renderer(), "chat_template", None):
            return f"{question}\n\n{answer}"
        messages = [("user", question), ("assistant", answer)]
        return self._rendered([{"role": r, "content": c} for r, c in messages], row.index)

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

    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _renderer(self) -> Any:
        """What has the chat template: the processor, or else its tokenizer."""
        own = getattr(self.processor, "chat_template", None)
        return self.processor if own else self._tokenizer()

    def _rendered(self, messages: list[Row], index: int) -> str:
        """A conversation as the chat template writes it."""
        renderer = self._renderer()
        try:
            messages = [_openai(message) for message in messages]
            if renderer is self._tokenizer():
                messages = [_joined_parts(message) for message in messages]
            text = renderer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template's code may raise whatever it likes
            raise CalibrationError(
                f"item {index} of the dataset is a conversation, which "
                f"{type(self.processor).__name__} can't render: {error}"
            ) from error
        # The tokenizer, or what packs texts, opens a text with this token of its own.
        return str(text).removeprefix(getattr(self._tokenizer(), "bos_token", None) or "")


def _openai(message: Row) -> Row:
    """A message with "role" and "content", which ShareGPT calls otherwise."""
    if "role" in message:
        return message
    return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}


def _joined_parts(message: Row) -> Row:
    """A message whose content is one text: a tokenizer's template knows no parts.

    Raises:
        ValueError: a part is no text.
    """
    content = message["content"]
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type {part.get('type')!r} is no text: pass a processor")
    return {**message, "content": "".join(part["text"] for part in content)}


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
