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
from fresh import LOADED, run
from PIL import Image

from hf_sparse.calibration import json_lines
from hf_sparse.calibration.files import read_file
from hf_sparse.calibration.unfolding import SMALLEST_LIMIT
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
    parse = json_lines._parsed
    monkeypatch.setattr(json_lines, "_parsed", lambda *args: parsed.append(args) or parse(*args))
    lines = read_file(tmp_path / "a.jsonl")
    parsed.clear()
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


def test_rows_of_a_parquet_file_are_found_in_any_order(tmp_path):
    rows = [{"text": str(i), "ids": [i] * (i % 3), "at": {"n": i}} for i in range(700)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found = read_file(tmp_path / "a.parquet")
    assert list(found) == rows
    places = [699, 5, 5, 300, *range(698, 0, -3)]
    assert list(found.each(places)) == [(i, rows[i]) for i in places]


def test_nothing_of_a_file_stays_in_a_cache(tmp_path):
    rows_of(tmp_path / "a.csv", "text,n\n5 6,1\n")
    rows_of(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "5 6"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["5 6"]}), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet")) == [{"text": "5 6"}]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".gz", ".parquet"]


def repeated(value, times, kind):
    """An array that a file holds in a few bytes."""
    return pyarrow.array([value], kind).take(pyarrow.array([0] * times, pyarrow.int32()))


def test_a_parquet_file_takes_the_room_of_the_rows_that_are_asked_for(tmp_path):
    text = repeated("x" * 1000, 30_000, pyarrow.string())
    columns = {"text": text, "large": text.cast(pyarrow.large_string()),
               "bytes": text.cast(pyarrow.binary()), "inner": pyarrow.StructArray.from_arrays(
                   [text, text], ["a", "b"])}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    done = run(FEW_ROWS, tmp_path / "a.parquet", imported=LOADED)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 << 20


FEW_ROWS = """
import sys
from pathlib import Path
import pyarrow
from hf_sparse.calibration.files import read_file
found = read_file(Path(sys.argv[1])).each([20_000, 3])
assert [len(row["text"]) for _, row in found] == [1000, 1000]
print(pyarrow.default_memory_pool().max_memory())
"""


WIDE = b"x" * (SMALLEST_LIMIT + 1)
BOMBS = {
    "a cell": (lambda: pyarrow.table({"text": [WIDE.decode()]}), "column 'text'"),
    "a list of one text": (
        lambda: pyarrow.table({"text": pyarrow.ListArray.from_arrays(
            [0, 300_000], repeated("x" * 200, 300_000, pyarrow.string()))}),
        "row 0",
    ),
    "a list of one number": (
        lambda: pyarrow.table({"ids": pyarrow.ListArray.from_arrays(
            [0, 5_000_000], pyarrow.array([7]).take(pyarrow.array([0] * 5_000_000)))}),
        "the values of column 'ids.list.element'",
    ),
    "rows without end": (
        lambda: pyarrow.table({"text": pyarrow.nulls(5_000_000, pyarrow.string())}),
        "the order of its rows",
    ),
    "wide values": (
        lambda: pyarrow.table({"text": repeated(WIDE[: 1 << 20], 50, pyarrow.binary(1 << 20))}),
        "column 'text'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_parquet_file_that_would_fill_the_memory_is_refused_first(tmp_path, bomb):
    make, what = BOMBS[bomb]
    pyarrow.parquet.write_table(make(), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(
        CalibrationError, match=rf"a\.parquet: .*{what}.* limit of 32 MiB"
    ) as caught:
        list(read_file(tmp_path / "a.parquet"))
    assert "50 times the file's size" in str(caught.value)


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_compressed_file_that_unfolds_without_end_is_refused(tmp_path, name, packed):
    end = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[packed]
    with pytest.raises(CalibrationError, match=r"what it unfolds to .* limit of 32 MiB"):
        rows_of(tmp_path / f"{name}{end}", packed(WIDE))


def test_json_that_would_be_many_objects_is_refused_before_it_is_parsed(tmp_path):
    many = b"[" + b"[]," * 600_000 + b"[]]"
    with pytest.raises(CalibrationError, match="a JSON value in memory would take"):
        rows_of(tmp_path / "a.json.gz", gzip.compress(many))
    with pytest.raises(CalibrationError, match="the places of its lines would take"):
        rows_of(tmp_path / "a.jsonl.gz", gzip.compress(b"1\n" * 2_200_000))


def test_an_image_s_path_in_a_parquet_file_is_not_opened(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    Image.new("RGB", (2, 1)).save(tmp_path / "mine.png")
    raw = [{"bytes": None, "path": str(tmp_path / "mine.png")}]
    made = datasets.Dataset.from_dict({"image": raw}, features=features)
    table = made.with_format("arrow")[:]
    schema = features.arrow_schema
    pyarrow.parquet.write_table(table.cast(schema), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"row 0 names a file, '.*mine\.png'"):
        read_file(tmp_path / "a.parquet")[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text\n"a ""b""\nc"\n\nd\n', [{"text": 'a "b"\nc'}, {"text": "d"}]),
        ("a,a,b\n1,x,\n2.5,,true\n",
         [{"a": 1, "a.1": "x", "b": None}, {"a": 2.5, "a.1": None, "b": True}]),
        ("text,n\n2024,NA\nyes,3\n", [{"text": "2024", "n": None}, {"text": "yes", "n": 3}]),
        ("text;n\nonly\n", [{"text": "only", "n": None}]),
        ("text\n" + "y" * 200_000 + "\n", [{"text": "y" * 200_000}]),
    ],
)  # fmt: skip
def test_cells_of_a_csv_file_are_text_unless_a_column_has_none(tmp_path, content, expected):
    assert rows_of(tmp_path / "a.csv", content) == expected


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
        (
            "a.csv",
            b"text,n\n1,2,3,4\n1\n5,6,7,8,9,10\n",
            r"a\.csv can't be read as csv: row 0 has 4 c",
        ),
        ("a.csv", b'text\n"5\n', r"a\.csv can't be read as csv: line 2: unexpected end"),
        ("a.csv", b"", r"a\.csv can't be read as csv: its first line is no header"),
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

    (tmp_path / "a.txt").write_text("5 6")
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(CalibrationError, match=r"a\.txt' can't be read: not yours"):
        read_file(tmp_path / "a.txt")
