"""Text from elsewhere (a checkpoint's config, a report, a card), made harmless for where it goes.

Each function takes any text and gives what shows it there and does nothing else. Into HTML it goes
through jinja2's autoescaping, into JSON through `json.dumps`.
"""

from __future__ import annotations

import re

# What begins something in Markdown, and what browsers read in the HTML that Markdown may hold.
_MARKDOWN = re.compile(r"[\\`*_\[\]|~#!:$^]|(?<=www)\.", re.IGNORECASE)
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: str, keep: str = "") -> str:
    r"""With an escape for every character that is none to be seen, as `\x1b` for ESC.

    Those are control characters, with which a terminal is told to do things, line ends, marks that
    turn the direction of writing, and halves of surrogate pairs, which no file can hold.

    Args:
        text: any text.
        keep: characters that stay as they are, e.g. a newline.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def brief(value: object, most: int = 80) -> str:
    """What somebody passed, for an error: its `repr` in a line of at most so many letters."""
    try:
        text = printable(repr(value))
    except Exception:  # an integer of many digits, a list in itself a thousand times, ...
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def markdown_text(text: str) -> str:
    """For a line of Markdown: no link, no HTML, no emphasis comes of it, and it stays one line."""
    escaped = _MARKDOWN.sub(r"\\\g<0>", printable(text))
    return "".join(_HTML.get(letter, letter) for letter in escaped)


def markdown_code(text: str) -> str:
    """For a line of Markdown, as code: between more backticks than it has in a row."""
    line = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{space}{line}{space}{fence}"


def python_string(text: str) -> str:
    """As the literal of a string in Python's source, in one line."""
    plain = text.isprintable() and '"' not in text and "\\" not in text
    return f'"{text}"' if plain else ascii(text)
