"""What is meant by a name, by several splits, by columns; and what is only a mistake."""

import datasets
import pandas
import pytest

from hf_sparse.calibration.items import Kind, kind_of
from hf_sparse.calibration.sources import open_source
from hf_sparse.core.errors import CalibrationError

SPLITS = {
    name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test", "validation")
}


def values(dataset, split="train"):
    return [item.value for item in open_source(dataset, 0, 99, split)[0]]


def splits(*names, streamed=False):
    if streamed:
        return datasets.IterableDatasetDict({n: SPLITS[n].to_iterable_dataset() for n in names})
    return datasets.DatasetDict({name: SPLITS[name] for name in names})


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("names", "split", "meant"),
    [
        (("train", "test"), "train", "train"),
        (("train", "test"), "test", "test"),
        (("validation",), "train", "validation"),
    ],
)
def test_of_several_splits_the_one_asked_for_or_the_only_one_is_meant(
    names, split, meant, streamed
):
    assert values(splits(*names, streamed=streamed), split) == [{"text": meant}]


def test_splits_that_leave_the_choice_open_are_named():
    words = r"a DatasetDict of test, validation, and has no 'train': pass one .* dataset\['test'\]"
    with pytest.raises(CalibrationError, match=words):
        values(splits("test", "validation"))


def test_columns_of_texts_are_rows_and_columns_of_ids_one_batch():
    assert values(SPLITS["train"][:1]) == [{"text": "train"}]
    talk = [{"role": "user", "content": "5"}]
    assert values({"messages": [talk, talk]}) == [{"messages": talk}] * 2
    assert values({"messages": talk}) == [{"messages": talk}]
    for batch in ({"input_ids": [[5, 6], [7, 8]]}, {"text": ["5"], "n": []}, {}):
        assert values(batch) == [batch]


LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.parametrize("text", [LONG, "Two words.", "a\nb", "and/or, say some"])
def test_a_text_instead_of_a_list_of_texts_is_an_error(text):
    with pytest.raises(CalibrationError, match=rf"a text of {len(text)} characters .*\[text\]"):
        values(text)


@pytest.mark.parametrize(
    "name",
    ["./data", "../a", "/a/b", "~/a", "a/b/c", "data/a.TXT", "my data/a.csv", "C:\\a", "~nobody/a"],
)
def test_what_can_be_no_hub_id_is_a_missing_file(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)  # would be a TypeError
    with pytest.raises(CalibrationError, match="there is no such file"):
        values(name)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("5 6")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values("~/a.txt") == ["5 6"]


def test_names_of_files_in_place_of_texts_are_an_error():
    with pytest.raises(CalibrationError, match=r"names of files, such as 'one\.txt'"):
        values(["one.txt", "two.txt"])
    assert len(values(["See one.txt", "5"])) == 2


@pytest.mark.parametrize("frame", [pandas.DataFrame({"text": ["5"]}), pandas.Series(["5"])])
def test_a_frame_of_pandas_is_an_error_that_says_what_to_pass(frame):
    with pytest.raises(CalibrationError, match=rf"a {type(frame).__name__} of pandas: pass"):
        values(frame)


def test_items_keep_the_numbers_that_they_have_in_the_user_s_data():
    drawn = list(open_source(list("abcdef"), 1, 3, "train")[0])
    assert [item.index for item in drawn] != list(range(6))
    assert all("abcdef"[item.index] == item.value for item in drawn)
    in_order = open_source(list("abcdef"), 1, 3, "train", in_order=True)[0]
    assert [item.value for item in in_order] == list("abcdef")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("5", Kind.TEXT),
        ({"text": "5", "id": 3}, Kind.TEXT),
        ({"content": "5"}, Kind.TEXT),
        ({"title": "5", "body": "6"}, Kind.ROW),
        ({"text": "5", "messages": [{"from": "human", "value": "6"}]}, Kind.ROW),
        ({"audio": {"array": [0.0], "sampling_rate": 4}}, Kind.ROW),
        ({"input_ids": [5], "text": "5"}, Kind.INPUTS),
        ({"pixel_values": [[0.5]]}, Kind.INPUTS),
        ({"n": 3}, Kind.INPUTS),
        ({}, Kind.INPUTS),
        ([5, 6], Kind.IDS),
        (5, Kind.IDS),
        (None, Kind.BLANK),
        (" \n", Kind.BLANK),
        ({"text": None, "title": "5"}, Kind.BLANK),
        ({"text": "", "n": 3}, Kind.BLANK),
        ({"messages": [], "n": 3}, Kind.BLANK),
    ],
    ids=str,
)
def test_the_kind_of_an_item_is_told_by_its_value(value, kind):
    assert kind_of(value) is kind
