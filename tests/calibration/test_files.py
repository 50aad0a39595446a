"""Files of each type give what they hold, in rows; broken ones an error that names them."""

import bz2
import codecs
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from hf_sparse.calibration import files
from hf_sparse.calibration.files import JsonLines, read_file
from hf_sparse.core.errors import CalibrationError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_file(path))


ROWS = [{"text": "5 6", "n": 1}, {"text": "7, 8", "n": 2}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("a.JSONL", "\n\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.csv", 'text,n\n5 6,1\n"7, 8",2\n'),
        ("a.csv", "text;n\r\n5 6;1\r\n7, 8;2\r\n"),
        ("a.tsv", "text\tn\n5 6\t1\n7, 8\t2\n"),
        ("a.CSV", 'text,n\n5 6,1\n"7, 8",2\n'),
        ("a.csv", "text|n\n5 6|1\n7, 8|2\n"),
        ("a.json", json.dumps({"version": "1.0", "data": ROWS})),
    ],
)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "BOM"])
def test_rows_are_the_same_in_every_type_of_file(tmp_path, name, content, mark):
    assert rows_of(tmp_path / name, mark + content.encode()) == ROWS


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)), ROWS),
        ("a.json", json.dumps(ROWS), ROWS),
        ("a.csv", 'text,n\n5 6,1\n"7, 8",2\n', ROWS),
        ("a.TXT", "5 6", ["5 6"]),
    ],
)
def test_a_compressed_file_has_the_rows_of_the_file_in_it(
    tmp_path, packed, name, content, expected
):
    end = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[packed]
    assert rows_of(tmp_path / f"{name}{end}", packed(content.encode())) == expected


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.bz2", "a.txt.xz", "a.txt.gz", "a.json.zst"])
def test_what_is_not_compressed_as_its_name_says_is_one_sentence(tmp_path, name):
    with pytest.raises(CalibrationError, match=rf"{name}\W.*can't be read"):
        rows_of(tmp_path / name, '{"text": "5 6"}')


def test_an_object_with_several_arrays_or_a_text_is_one_value(tmp_path):
    for value in ({"a": ["5"], "b": ["6"]}, {"text": "5", "tags": ["6"]}, {"input_ids": [5, 6]}):
        assert rows_of(tmp_path / "a.json", json.dumps(value)) == [value]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    assert rows_of(tmp_path / "a.txt", codecs.BOM_UTF8 + b"5 6") == ["5 6"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[5, 6]", [[5, 6]]),
        ("[5, 6]\n[7, 8]", [[5, 6], [7, 8]]),
        ("[[5, 6], [7, 8]]", [[5, 6], [7, 8]]),
        ('["5 6", "7"]', ["5 6", "7"]),
        ('"5 6"', ["5 6"]),
        ('{"a": 1}', [{"a": 1}]),
        ('{\n"a": 1\n}', [{"a": 1}]),
        ("[]", []),
        ("", []),
    ],
)
def test_one_array_is_all_values_and_an_array_of_ids_is_one(tmp_path, content, expected):
    assert rows_of(tmp_path / "a.json", content) == expected


def test_only_the_lines_that_are_asked_for_are_parsed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1000)))
    parsed = []
    parse = files._parsed
    monkeypatch.setattr(files, "_parsed", lambda line: parsed.append(line) or parse(line))
    lines = JsonLines(tmp_path / "a.jsonl")
    assert len(lines) == 1000
    assert lines[700] == {"text": "700"}
    assert len(parsed) == 1


def test_a_missing_cell_of_a_table_is_none(tmp_path):
    found = rows_of(tmp_path / "a.csv", "text,n\n,1\n5,\n")
    assert found == [{"text": None, "n": 1}, {"text": 5, "n": None}]


def test_a_parquet_file_s_images_are_decoded(tmp_path):
    image = datasets.Features({"image": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 1))]}, features=image)
    made.to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet")[0]["image"].size == (2, 1)


def test_a_parquet_file_is_read_in_pieces(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 3000}), tmp_path / "a.parquet")
    largest = []
    write = datasets.arrow_writer.ArrowWriter.write_table

    def watched(self, table, *args, **kwargs):
        largest.append(len(table))
        return write(self, table, *args, **kwargs)

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", watched)
    assert len(read_file(tmp_path / "a.parquet")) == 3000
    assert max(largest) <= 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "5"}\n\nplain\n', r"a\.jsonl is not JSON lines: line 3: Expecting"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100000, r"a\.jsonl .*line 2.*nested too deeply"),
        ("a.json", b"[" * 100000, r"a\.json is not JSON lines, nor one JSON array.*nested too"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl is not JSON .*5000 digits"),
        ("a.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"), r"a\.jsonl is not JSON .*utf-8"),
        ("a.jsonl", '{"text": "5"}'.encode("utf-16"), r"a\.jsonl is not JSON .*utf-8"),
        ("a.json", b'[{"text": "5"}', r"a\.json is not JSON lines, nor one JSON array"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text.*told apart by their names: \.txt"),
        ("a.bin", b"\x80\x02", r"a\.bin is not UTF-8 text"),
        ("a.csv", b"caf\xe9,b\n1,2\n", r"a\.csv is not UTF-8 text"),
        ("a.csv", b"text,n\n1,2,3,4\n1\n5,6,7,8,9,10\n", r"a\.csv can't be read as csv: \w+Error"),
        ("a.csv", b"", r"a\.csv can't be read as csv: EmptyDataError"),
        ("a.parquet", b"PAR1garbage", r"a\.parquet can't be read as parquet: ArrowInvalid: Parq"),
        ("a.parquet", b"", r"a\.parquet can't be read as parquet: \w+"),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, name, content, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        rows_of(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CalibrationError, match=r"a\.txt' can't be read: not yours"):
        read_file(tmp_path / "a.txt")
