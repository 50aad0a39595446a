"""JSON from elsewhere: a value within bounds, or the caller's own error."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from hf_sparse import CalibrationError, CheckpointError
from hf_sparse.core.json_records import json_text, parse_json, read_json, read_record

UNUSABLE = {
    "arrays, far too deep": "[" * 100_000,
    "objects, far too deep": '{"a":' * 100_000,
    "closed, too deep": "[" * 65 + "]" * 65,
    "deep in an object": '{"a":' * 65 + "1" + "}" * 65,
    "many digits": "1" * 5000,
    "many digits, inside": '{"a": [' + "9" * 400 + "]}",
    "a float beyond all": "1e999",
    "a float beyond 2^63": "[-1e300]",
    "not a number": "NaN",
    "infinity": '{"a": -Infinity}',
    "half a pair": '"\\ud800"',
    "half a pair, in a key": '{"\\udc00": 1}',
    "cut short": "{",
    "nothing": "",
    "two values": "1 2",
    "a byte order mark": "\ufeff{}",
}
unusable = pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)


@unusable
def test_what_cannot_be_used_is_the_caller_s_error_and_names_what_was_read(text):
    with pytest.raises(CalibrationError, match=r"line 3 of x\.jsonl is not JSON that can be used"):
        parse_json(text, "line 3 of x.jsonl", CalibrationError)


@unusable
def test_a_file_that_cannot_be_used_is_named(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, -3, None, True, "x", {}], "é": 2**63, "b": -1e18, "c": 5e-324},
        [[[[1]]]],
        "🙂",
        0,
    ],
    ids=str,
)
def test_what_can_be_used_is_what_json_says(value):
    assert parse_json(json.dumps(value), "it") == value


def test_the_depth_is_counted_whatever_the_interpreter_s_limit(monkeypatch):
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(5000)
        with pytest.raises(CheckpointError, match="nested"):
            parse_json("[" * 300 + "]" * 300, "it")
    finally:
        sys.setrecursionlimit(before)


def test_any_number_may_be_allowed():
    assert parse_json('{"a": [Infinity, 1e300]}', "it", any_number=True) == {
        "a": [float("inf"), 1e300]
    }


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text('"' + "a" * 100 + '"')
    with pytest.raises(CheckpointError, match="102 bytes: expected 50 at most"):
        read_json(tmp_path / "a.json", largest=50)


def test_a_folder_bytes_that_are_no_text_and_nothing_at_all_are_told_apart(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="can't be read"):
        read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="is no file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


@dataclass(frozen=True)
class Point:
    x: float
    count: int
    names: tuple[str, ...] = ()
    more: Mapping[str, float] | None = None


def test_a_record_s_strings_do_nothing_to_a_terminal():
    content = {"x": 1, "count": 2, "names": ["\x1b[31m"], "more": {"\u202e": 0.5}}
    point = read_record(Point, content, "it")
    assert point.names == ("\\x1b[31m",)
    assert point.more == {"\\u202e": 0.5}


def test_a_record_is_made_of_json_and_newer_fields_are_left_out():
    content = {"x": 1, "count": 2, "names": ["a"], "more": {"b": 0.5}, "new": []}
    point = read_record(Point, content, "it")
    assert point == Point(1.0, 2, ("a",), {"b": 0.5})
    assert isinstance(point.x, float)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": 10**400}, "it, x: a number of many digits is no count or measure"),
        ({"x": 1e308}, "x: 1e\\+308 is no count or measure"),
        ({"x": float("nan")}, "x: nan is no count"),
        ({"count": -1}, "count: -1 is no count"),
        ({"count": 2**63 + 1}, "count: .* is no count"),
        ({"count": 1.0}, "count: 1.0 is no int"),
        ({"count": True}, "count: True is no int"),
        ({"count": 10**400, "x": "y"}, "x: 'y' is no float"),
        ({"names": "abc"}, "names: 'abc' is no list"),
        ({"names": [10**400]}, "names, 0: a number of many digits is no str"),
        ({"more": {"a": "b"}}, "more, a: 'b' is no float"),
        ({"more": []}, r"more: \[\] is no dict"),
    ],
    ids=str,
)
def test_a_record_s_wrong_field_is_named(change, words):
    with pytest.raises(CheckpointError, match=words):
        read_record(Point, {"x": 1.0, "count": 2} | change, "it")


def test_what_is_written_is_json_for_every_reader():
    written = json_text({"a": (1.5, float("inf"), {"b": [float("nan"), "é", None, True]})})
    assert parse_json(written, "it") == {"a": [1.5, None, {"b": [None, "é", None, True]}]}
