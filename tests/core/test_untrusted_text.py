"""Whatever a stranger writes is shown where it goes, and does nothing there."""

import ast
import unicodedata

import pytest

from hf_sparse import CheckpointError
from hf_sparse.core.untrusted_text import markdown_code, markdown_text, printable, python_string

NASTY = [
    'x"); import os; os.system("id")  # ',
    "x'); import os  # ",
    "back\\slash\\",
    "</script><img src=x onerror=alert(1)>",
    "[click](https://elsewhere.example) ![](https://elsewhere.example/p.png)",
    "https://elsewhere.example www.elsewhere.example",
    "| a | b |",
    "```\n# heading\n```",
    "`one` ``two``",
    "\x1b]0;title\x07\x1b[31mred\x9b31m",
    "a\r\nb\u2028c\u0085d\ve",
    "\u202egnp.exe \u200b\ufeff",
    "\ud800 half \udfff",
    " ",
    "",
    "\0",
]
every_text = pytest.mark.parametrize("text", NASTY, ids=ascii)


@every_text
@pytest.mark.parametrize("harmless", [printable, markdown_text, markdown_code, python_string])
def test_what_comes_out_is_one_line_that_every_file_and_terminal_takes(text, harmless):
    line = harmless(text)
    line.encode()
    assert len(line.splitlines()) <= 1
    assert {unicodedata.category(c)[0] for c in line} <= {*"LMNPSZ"}


@pytest.mark.parametrize("text", ["model.layers.0", "größe 4 % 東京 🙂", 'a "b" <c>'])
def test_text_that_can_be_seen_stays_as_it_is(text):
    assert printable(text) == text


def test_kept_characters_stay():
    assert printable("a\tb\n\x1b", keep="\n") == "a\\tb\n\\x1b"


@every_text
def test_a_python_literal_is_one_string_and_nothing_more(text):
    (statement,) = ast.parse(f"f({python_string(text)})").body
    (argument,) = statement.value.args
    assert isinstance(argument, ast.Constant)
    assert argument.value == text


@every_text
def test_markdown_text_leaves_nothing_that_begins_anything(text):
    line = markdown_text(text)
    assert not {*"<>"} & {*line}
    unescaped = line.replace("\\\\", "")
    for letter in "`*_[]|#!:":
        assert unescaped.count(letter) == unescaped.count(f"\\{letter}")


@every_text
def test_code_is_longer_fenced_than_anything_in_it(text):
    code = markdown_code(text)
    fence = len(code) - len(code.lstrip("`"))
    inside = code[fence:-fence]
    assert code == "`" * fence + inside + "`" * fence
    assert not inside.startswith("`")
    assert not inside.endswith("`")
    assert "`" * fence not in inside
    assert inside.strip() == printable(text).strip()


def test_an_error_s_message_does_nothing_to_a_terminal():
    assert str(CheckpointError("a\x1b[31m\nb")) == "a\\x1b[31m\nb"
