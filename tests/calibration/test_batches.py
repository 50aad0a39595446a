"""Whatever users pass becomes the same batches every time, or an error that says what is wrong.

The tokenizers here read a text as numbers: "5 6 7" has the ids 5, 6 and 7.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import BatchEncoding

from hf_sparse.calibration import batches
from hf_sparse.calibration.batches import CalibrationData, make_batches
from hf_sparse.core.errors import CalibrationError


class Decoder:
    """Opens a text with BOS, as Llama's tokenizer does, and closes it with nothing."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos
        self.all_special_ids = [token for token in (bos, eos) if token is not None]

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [int(word) if word.isdigit() else 99 for word in text.split()]
        opening = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
        return {"input_ids": opening + ids}


class Encoder:
    """Puts a text between [CLS] = 1 and [SEP] = 2, as BERT's tokenizer does."""

    bos_token_id = eos_token_id = None
    all_special_ids = (1, 2)

    def __call__(
        self, text, truncation=False, max_length=None, add_special_tokens=True, verbose=True
    ):
        ids = [int(word) if word.isdigit() else 99 for word in text.split()]
        if truncation:
            ids = ids[: max_length - 2]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def no_tokenizer():
    raise AssertionError("a tokenizer is loaded for text only")


def make(dataset, tokenizer=None, **changes) -> CalibrationData:
    arguments = {
        "num_samples": 100,
        "seq_len": 4,
        "batch_size": 1,
        "seed": 0,
        "vocab_size": None,
    }
    load = (lambda: tokenizer) if tokenizer else no_tokenizer
    return make_batches(dataset, load, **(arguments | changes))


def ids_of(data: CalibrationData) -> list[list[int]]:
    return [row for batch in data.batches for row in batch["input_ids"].tolist()]


def in_order(*items):
    """A plain iterable, which is taken as it comes."""
    return iter(items)


# --- text -----------------------------------------------------------------------------------


def test_text_is_packed_behind_bos_and_cut_into_full_sequences():
    data = make(in_order("5 6 7", "8", "9 10 11 12"), Decoder())
    assert ids_of(data) == [[1, 5, 6, 7], [1, 8, 1, 9]]  # 10 11 12 are dropped
    assert data.record.count == 2
    assert data.record.tokens == 8
    assert all(set(batch) == {"input_ids"} for batch in data.batches)
    assert data.batches[0]["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (None, 2, [[2, 5, 6, 7], [2, 8, 9, 10]]),
        (None, None, [[5, 6, 7, 8]]),
        (0, 2, [[0, 5, 6, 7], [0, 8, 9, 10]]),
    ],
)
def test_without_bos_a_document_is_opened_by_eos_or_by_nothing(bos, eos, expected):
    assert ids_of(make(in_order("5 6 7", "8 9 10"), Decoder(bos, eos))) == expected


def test_a_real_tokenizer_s_text_is_packed_as_the_reference_does(tokenizer, data_path):
    text = (data_path / "calibration.txt").read_text(encoding="utf-8")
    pages = text.split("\n\n\0\n")[:3]
    stream = []
    for page in pages:
        stream += [tokenizer.bos_token_id, *tokenizer(page, add_special_tokens=False)["input_ids"]]
    expected = [stream[i : i + 64] for i in range(0, 4 * 64, 64)]
    assert ids_of(make(in_order(*pages), tokenizer, seq_len=64, num_samples=4)) == expected


def test_no_more_text_is_read_than_is_needed():
    read = []

    def endless():
        for i in itertools.count(5):
            read.append(i)
            yield f"{i} {i} {i}"

    data = make(endless(), Decoder(), num_samples=3)
    assert ids_of(data) == [[1, 5, 5, 5], [1, 6, 6, 6], [1, 7, 7, 7]]
    assert read == [5, 6, 7]


def test_fewer_samples_than_wanted_are_all_used():
    assert make(in_order("5 6 7 8 9 10 11"), Decoder(), num_samples=9).record.count == 2


@pytest.mark.parametrize(
    "rows",
    [
        ["5 6 7"],
        [{"text": "5 6 7"}],
        [{"text": "5 6 7", "title": "8 9"}],
        [{"content": "5 6 7"}],
        ({"text": "5 6 7"},),
        datasets.Dataset.from_dict({"text": ["5 6 7"]}),
        datasets.Dataset.from_dict({"text": ["5 6 7"], "id": [3]}),
        datasets.Dataset.from_dict({"page": ["5 6 7"]}).to_iterable_dataset(),
    ],
    ids=lambda rows: f"{type(rows).__name__}",
)
def test_strings_and_rows_with_text_are_text(rows):
    assert ids_of(make(rows, Decoder())) == [[1, 5, 6, 7]]


def test_an_encoder_s_texts_are_one_truncated_sample_each():
    data = make(in_order("5", "6 7 8 9", "  ", "10 11"), Encoder(), batch_size=2)
    assert [batch["input_ids"].tolist() for batch in data.batches] == [
        [[1, 5, 2, 0], [1, 6, 7, 2]],
        [[1, 10, 11, 2]],
    ]
    assert data.batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert "attention_mask" not in data.batches[1]
    assert data.record.count == 3
    assert data.record.tokens == 11


def test_an_encoder_reads_as_many_texts_as_are_wanted():
    data = make((str(i) for i in itertools.count(5)), Encoder(), num_samples=3)
    assert ids_of(data) == [[1, 5, 2], [1, 6, 2], [1, 7, 2]]


# --- token ids ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items",
    [
        [[5, 6, 7], [8, 9, 10]],
        ([5, 6, 7], (8, 9, 10)),
        [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10], dtype=torch.int32)],
        [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])],
        torch.tensor([[5, 6, 7], [8, 9, 10]]),
    ],
    ids=["lists", "tuples", "1-D tensors", "2-D tensors of one row", "one 2-D tensor"],
)
@pytest.mark.parametrize("lazily", [False, True])
def test_sequences_of_ids_are_samples(items, lazily):
    data = make(iter(items) if lazily else items)
    assert ids_of(data) == [[5, 6, 7], [8, 9, 10]]
    assert {batch["input_ids"].dtype for batch in data.batches} == {torch.int64}


def test_ids_are_cut_to_the_length_and_shorter_ones_padded_on_the_right():
    data = make([[5, 6, 7, 8, 9, 10], [11], [12, 13]], batch_size=2)
    first, second = data.batches
    assert first["input_ids"].tolist() == [[5, 6, 7, 8], [11, 0, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert second["input_ids"].tolist() == [[12, 13]]
    assert set(second) == {"input_ids"}
    assert (data.record.count, data.record.tokens) == (3, 7)


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_samples_are_grouped_into_batches(batch_size, sizes):
    data = make([[i, i] for i in range(5)], batch_size=batch_size)
    assert [len(batch["input_ids"]) for batch in data.batches] == sizes
    assert data.record.count == 5


# --- dicts of model inputs ------------------------------------------------------------------


def test_a_dict_of_model_inputs_is_a_batch_as_it_is_without_labels():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    item = {"input_ids": [[5, 6, 0], [7, 8, 9]], "attention_mask": mask, "labels": [[5, 6, 0]] * 2}
    data = make([item], batch_size=7, seq_len=2)
    assert len(data.batches) == 1
    assert data.batches[0]["input_ids"].tolist() == item["input_ids"]
    assert torch.equal(data.batches[0]["attention_mask"], mask)
    assert set(data.batches[0]) == {"input_ids", "attention_mask"}
    assert (data.record.count, data.record.tokens) == (2, 5)
    assert "labels" in item


def test_one_dimensional_inputs_get_a_batch_dimension():
    item = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}
    (batch,) = make([item]).batches
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (1, 3),
        "attention_mask": (1, 3),
    }


def test_inputs_that_are_no_tokens_pass_through():
    pixels = torch.rand(2, 3, 4, 4)
    data = make([{"pixel_values": pixels}])
    assert torch.equal(data.batches[0]["pixel_values"], pixels)
    assert data.record.count == 2


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_single_dict_is_one_batch(kind):
    data = make(kind({"input_ids": torch.tensor([[5, 6], [7, 8]])}))
    assert ids_of(data) == [[5, 6], [7, 8]]
    assert len(data.batches) == 1


def test_a_table_of_token_ids_gives_a_batch_a_row():
    table = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [1, 0]})
    assert ids_of(make(table)) == [[5, 6], [7, 8]]
    assert ids_of(make(table.with_format("torch"))) == [[5, 6], [7, 8]]


def test_text_beside_the_ids_that_were_made_of_it_is_left_out():
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "input_ids": [[5, 6], [7, 8]]})
    data = make(table)
    assert [list(batch) for batch in data.batches] == [["input_ids"], ["input_ids"]]
    assert ids_of(data) == [[5, 6], [7, 8]]


class Listed(torch.utils.data.Dataset):
    """Has a length and places, and no iterator."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_data_set_of_torch_is_as_a_list_of_its_items():
    items = [torch.tensor([5, 6]), torch.tensor([7, 8])]
    assert ids_of(make(Listed(items))) == [[5, 6], [7, 8]]
    assert ids_of(make(torch.utils.data.TensorDataset(torch.stack(items)))) == [[5, 6], [7, 8]]
    texts = ["5 6 5 6 5 6", "7 8 7 8 7 8"]
    assert ids_of(make(Listed(texts), Decoder())) == ids_of(make(texts, Decoder()))


def test_dicts_are_limited_to_the_samples_wanted():
    items = [{"input_ids": [i]} for i in range(9)]
    assert ids_of(make(iter(items), num_samples=2)) == [[0], [1]]


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [str, Path])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".text"])
def test_a_text_file_without_separators_is_one_document(tmp_path, suffix, as_text):
    path = tmp_path / f"words{suffix}"
    path.write_text("5 6\n\n7 8\n", encoding="utf-8")
    data = make(as_text(path), Decoder(), seq_len=5)
    assert ids_of(data) == [[1, 5, 6, 7, 8]]
    assert data.record.source == f"words{suffix}"


def test_a_text_file_is_split_at_lines_that_hold_a_nul_byte(tmp_path):
    path = tmp_path / "pages.txt"
    path.write_text("5 6 7\n\n\0\n8 9 10\n\0\n \n\n\0\n11 12 13", encoding="utf-8")
    found = ids_of(make(path, Decoder()))
    assert sorted(found) == [[1, 5, 6, 7], [1, 8, 9, 10], [1, 11, 12, 13]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    "lines", [[{"text": "5 6 7"}, {"text": "8 9 10"}], ["5 6 7", "8 9 10"]], ids=["rows", "strings"]
)
def test_json_lines_hold_text(tmp_path, suffix, lines):
    path = tmp_path / f"data{suffix}"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert sorted(ids_of(make(path, Decoder()))) == [[1, 5, 6, 7], [1, 8, 9, 10]]


@pytest.mark.parametrize(
    "lines", [[[5, 6], [7, 8]], [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]]
)
def test_json_lines_hold_token_ids(tmp_path, lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert sorted(ids_of(make(path))) == [[5, 6], [7, 8]]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"], ids=ascii)
def test_json_lines_end_at_line_feeds_only(tmp_path, separator):
    # JSON allows these characters unescaped inside a string, and writers leave them so.
    path = tmp_path / "data.jsonl"
    line = json.dumps({"text": f"5 {separator} 6 7"}, ensure_ascii=False)
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert ids_of(make(path, Decoder())) == [[1, 5, 6, 7]] * 2


def test_json_lines_may_end_as_on_windows(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "5 6 7"}\r\n{"text": "5 6 7"}\r\n')
    assert ids_of(make(path, Decoder())) == [[1, 5, 6, 7]] * 2


def test_parquet_holds_text_or_token_ids(tmp_path):
    text, ids = tmp_path / "text.parquet", tmp_path / "ids.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["5 6 7"], "n": [1]}), text)
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[5, 6], [7, 8]]}), ids)
    assert ids_of(make(str(text), Decoder())) == [[1, 5, 6, 7]]
    assert sorted(ids_of(make(ids))) == [[5, 6], [7, 8]]


# --- the Hub --------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The package `datasets`, as far as it is used; records what it was asked for."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "5 6 7"}, {"text": "8 9 10"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("name", "repository", "configuration"),
    [
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("c4", "allenai/c4", "en"),
        ("someone/texts", "someone/texts", None),
        ("someone/texts:german", "someone/texts", "german"),
    ],
)
def test_a_hub_data_set_s_training_split_is_streamed(hub, name, repository, configuration):
    data = make(name, Decoder())
    assert hub == [((repository, configuration), {"split": "train", "streaming": True})]
    assert ids_of(data) == [[1, 5, 6, 7], [1, 8, 9, 10]]
    assert data.record.source == name


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("no such split")])
def test_a_data_set_that_the_hub_does_not_give_is_an_error(hub, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    with pytest.raises(CalibrationError, match=rf"'someone/texts' is neither a file.*{error}"):
        make("someone/texts", Decoder())


def test_a_stream_that_breaks_off_is_one_sentence_with_its_cause(hub, monkeypatch):
    class ConnectionLostError(Exception):
        """Neither an OSError nor a ValueError, as in the libraries that read from the network."""

    def rows():
        yield {"text": "5 6 7"}
        raise ConnectionLostError("peer closed\nthe connection")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **k: rows())
    expected = (
        "dataset='someone/texts' broke off on the Hub after 1 rows: try again, or download it and "
        "pass a file (ConnectionLostError: peer closed the connection)"
    )
    with pytest.raises(CalibrationError) as caught:
        make("someone/texts", Decoder())
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, ConnectionLostError)


def test_a_hub_name_without_the_package_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        make("someone/texts", Decoder())


def test_a_parquet_file_without_the_package_datasets_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"a\.parquet needs .* pip install datasets"):
        make(tmp_path / "a.parquet")


def test_many_blank_items_at_the_beginning_end_the_search(monkeypatch):
    monkeypatch.setattr(batches, "MOST_BLANK", 3)
    with pytest.raises(CalibrationError, match="its first 3 items are blank"):
        make(iter(["", " ", "", "5 6"]), Decoder())


def test_a_text_is_not_read_further_than_its_tokens_are_needed():
    read = []

    class Watched(Decoder):
        def __call__(self, text, **settings):
            read.append(len(text))
            return super().__call__(text, **settings)

    long = " ".join(str(3 + i % 50) for i in range(100_000))
    found = make([long], Watched(), num_samples=2, seq_len=8)
    short = make([long[:2000]], Decoder(), num_samples=2, seq_len=8)
    assert found.record.digest == short.record.digest
    assert max(read) <= 1024


# --- which samples, and in which order ------------------------------------------------------

MANY = [[i, i + 1] for i in range(3, 60)]
TEXTS = [f"{i} {i} {i}" for i in range(3, 60)]


def test_the_same_seed_draws_the_same_ids_and_another_seed_others():
    first, again, other = (ids_of(make(MANY, num_samples=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(row) for row in first}) == 8
    assert all(row in MANY for row in first)


def test_all_ids_are_used_as_they_stand_if_there_are_no_more_than_wanted():
    for seed in (0, 1):
        assert ids_of(make(MANY, num_samples=len(MANY), seed=seed)) == MANY


def test_the_same_seed_draws_the_same_documents_and_another_seed_others():
    first, again, other = (
        ids_of(make(TEXTS, Decoder(), num_samples=8, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({tuple(row) for row in first}) == 8
    assert all(row[0] == 1 and f"{row[1]} {row[2]} {row[3]}" in TEXTS for row in first)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_documents_are_drawn_from_the_whole_source(seed):
    found = {row[1] for row in ids_of(make(TEXTS, Decoder(), num_samples=20, seed=seed))}
    assert min(found) < 20
    assert max(found) > 43


def test_a_plain_iterable_is_taken_as_it_comes_whatever_the_seed():
    for seed in (0, 1):
        assert ids_of(make(iter(MANY), num_samples=5, seed=seed)) == MANY[:5]
        assert ids_of(make(iter(TEXTS), Decoder(), num_samples=2, seed=seed)) == [
            [1, 3, 3, 3],
            [1, 4, 4, 4],
        ]


def test_only_the_documents_that_are_needed_are_fetched_from_a_sized_source():
    fetched = []

    class Source:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            fetched.append(i)
            if i >= 1000:
                raise IndexError
            return "5 6 7"

        def __iter__(self):
            raise AssertionError("a sized source is drawn from, not read through")

    assert make(Source(), Decoder(), num_samples=4).record.count == 4
    assert len(fetched) <= 5  # the first one tells what kind of items there are


def test_the_data_passed_are_left_as_they_were():
    items = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([1])}]
    make(items)
    assert set(items[0]) == {"input_ids", "labels"}
    assert items[0]["input_ids"].shape == (2,)


# --- the record -----------------------------------------------------------------------------


def test_equal_data_have_equal_digests_whatever_they_came_in():
    digests = {
        make(dataset).record.digest
        for dataset in ([[5, 6]], torch.tensor([[5, 6]]), iter([torch.tensor([5, 6])]))
    }
    assert len(digests) == 1
    assert all(len(digest) == 64 for digest in digests)


def test_any_change_of_the_inputs_changes_the_digest():
    def inputs(ids, **more):
        return {"input_ids": torch.tensor(ids), **more}

    variants = [
        [inputs([[5, 6]])],
        [inputs([[5, 7]])],
        [inputs([[6, 5]])],
        [inputs([[5], [6]])],
        [inputs([[5]]), inputs([[6]])],
        [inputs([[6]]), inputs([[5]])],
        [inputs([[5, 6]], attention_mask=torch.tensor([[1, 1]]))],
        [inputs([[5, 6]], attention_mask=torch.tensor([[1, 0]]))],
        [inputs([[5, 6]], token_type_ids=torch.tensor([[1, 1]]))],
        [{"decoder_input_ids": torch.tensor([[5, 6]])}],
        [{"input_ids": torch.tensor([[5, 6]], dtype=torch.int32)}],
    ]
    digests = [make(variant).record.digest for variant in variants]
    assert len(set(digests)) == len(variants)


@pytest.mark.parametrize(
    ("dataset", "source"),
    [
        ([[5]], "list"),
        (torch.tensor([[5]]), "Tensor"),
        ((x for x in [[5]]), "generator"),
        (datasets.Dataset.from_dict({"input_ids": [[5]]}), "Dataset"),
    ],
    ids=["list", "Tensor", "generator", "Dataset"],
)
def test_the_record_names_the_kind_of_source(dataset, source):
    assert make(dataset).record.source == source


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset",
    [[], (), iter(()), torch.empty(0, 4, dtype=torch.int64)],
    ids=["list", "tuple", "iterator", "tensor"],
)
def test_an_empty_dataset_is_an_error_that_names_it(dataset):
    with pytest.raises(CalibrationError, match=f"dataset {type(dataset).__name__} is empty"):
        make(dataset)


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", ""), ("a.txt", " \n\n\0\n "), ("a.jsonl", "\n")]
)
def test_an_empty_file_is_an_error_that_names_it(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CalibrationError, match=rf"dataset {name} is empty"):
        make(tmp_path / name, Decoder())


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.parquet"])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(CalibrationError, match=rf"{name}'?: there is no such file"):
        make(str(tmp_path / name), Decoder())


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(CalibrationError, match="is a folder: pass one file"):
        make(tmp_path, Decoder())
    datasets.Dataset.from_dict({"text": ["5"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CalibrationError, match=r"is a folder: pass datasets\.load_from_disk"):
        make(tmp_path / "saved", Decoder())


def test_lines_that_are_not_json_are_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "5"}\nplain text\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"a\.jsonl is not JSON lines"):
        make(tmp_path / "a.jsonl", Decoder())


@pytest.mark.parametrize("value", ["5", "1.5", "true"])
def test_a_json_file_of_a_single_value_is_an_error_that_says_what_is_expected(tmp_path, value):
    (tmp_path / "a.json").write_text(value, encoding="utf-8")
    with pytest.raises(CalibrationError, match="expected a string, a dict of model inputs"):
        make(tmp_path / "a.json", Decoder())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_file_in_another_encoding_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes("5 caf\u00e9 6".encode("latin-1"))
    with pytest.raises(CalibrationError, match=name):
        make(tmp_path / name, Decoder())


@pytest.mark.parametrize("dataset", [5, 0.5, object(), len], ids=["int", "float", "object", "len"])
def test_something_that_can_not_be_iterated_is_an_error(dataset):
    with pytest.raises(CalibrationError, match=f"type {type(dataset).__name__} can't be iterated"):
        make(dataset)


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(CalibrationError, match="pass tokenizer="):
        make_batches(
            ["5 6 7"],
            lambda: None,
            num_samples=1,
            seq_len=2,
            batch_size=1,
            seed=0,
            vocab_size=None,
        )


def test_too_little_text_for_one_sequence_is_an_error_with_both_numbers():
    with pytest.raises(CalibrationError, match=r"has 3 tokens, fewer than one sequence of 4"):
        make(["5 6"], Decoder())


def test_an_encoder_without_any_text_is_an_error():
    with pytest.raises(CalibrationError, match="dataset list has no text in it"):
        make([" ", "\n"], Encoder())


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("5 6", [5, 6]), "mixes text with a list"),
        (("5 6", {"a": "5", "b": "6"}), "mixes text with a dict with columns a, b"),
        (({"text": "5"}, {"text": 6}), "mixes text with a dict with columns text"),
        (("5 6", torch.tensor([5])), "mixes text with a Tensor"),
        (([5, 6], "5 6"), "item 1 of the dataset is a str"),
        (([5, 6], {"input_ids": [5]}), "item 1 of the dataset is a dict"),
        (({"input_ids": [5]}, [5]), "item 1 of the dataset is a list, the first one is a dict"),
        (({"input_ids": [5]}, "5 6"), "item 1 of the dataset is a str, the first one is a dict"),
    ],
)
def test_items_of_several_kinds_are_an_error_that_names_the_odd_one(items, message):
    with pytest.raises(CalibrationError, match=message):
        make(iter(items), Decoder(), seq_len=50)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([0.5, 1.5], r"a list of shape \(2,\) and torch.float32"),
        (torch.tensor(5), r"a Tensor of shape \(\)"),
        (7, r"a int of shape \(\)"),
        (torch.ones(2, 3, dtype=torch.int64), r"a Tensor of shape \(2, 3\)"),
        ([], r"a list of shape \(0,\)"),
        ([5, "6"], "a list: expected"),
        ([True, False], r"a list of shape \(2,\) and torch.bool: expected"),
        ([[5], [6, 7]], "a list: expected"),
        (len, "a builtin_function_or_method: expected"),
        (None, "a NoneType: expected"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else "",
)
def test_an_item_that_is_no_sequence_of_ids_is_an_error_that_describes_it(item, message):
    with pytest.raises(CalibrationError, match=f"item 1 of the dataset is {message}"):
        make(in_order([5, 6], item))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"input_ids": [5], "name": ["x"]}, "holds 'name'"),
        ({"input_ids": None}, "holds 'input_ids'"),
        ({"input_ids": 5}, "holds 'input_ids'"),
        ({"input_ids": [[5], [6, 7]]}, "holds 'input_ids'"),
        ({"a": "5 6", "b": torch.tensor([7])}, "holds 'a'"),
        ({5: [1]}, "holds 5"),
        ({"text": 5}, "holds 'text', .* or 'text' to a string"),
        ({"input_ids": [1.5, 2.0]}, "has input_ids of torch.float32: expected integers"),
        ({"input_ids": [True, False]}, "has input_ids of torch.bool: expected integers"),
        ({"labels": [1]}, "holds nothing"),
        ({}, "holds nothing"),
    ],
    ids=str,
)
def test_a_dict_of_something_else_than_tensors_is_an_error_that_names_it(item, message):
    with pytest.raises(CalibrationError, match=f"item 0 of the dataset {message}"):
        make(in_order(item))


@pytest.mark.parametrize("side", ["", "decoder_"])
def test_a_mask_of_another_shape_than_its_ids_is_an_error_and_one_of_pairs_is_not(side):
    ids, pairs = torch.tensor([[5, 6, 7]]), torch.ones(1, 1, 3, 3)
    item = {"input_ids": ids, f"{side}input_ids": ids}
    make([item | {f"{side}attention_mask": pairs}])
    with pytest.raises(CalibrationError, match=rf"{side}attention_mask of shape \(1, 2\), expect"):
        make([item | {f"{side}attention_mask": torch.ones(1, 2)}])


@pytest.mark.parametrize("ids", [[], [[]]], ids=str)
def test_model_inputs_without_tokens_are_an_error(ids):
    with pytest.raises(CalibrationError):
        make(in_order({"input_ids": [5]}, {"input_ids": ids}), vocab_size=10)


@pytest.mark.parametrize(("bad", "named"), [(10, 10), (99, 99), (-1, -1)])
@pytest.mark.parametrize("kind", ["ids", "inputs"])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_sample_and_id(bad, named, kind):
    items = [[5, 6], [7, bad]]
    if kind == "inputs":
        items = [{"input_ids": ids} for ids in items]
    message = rf"sample 1 .* token id {named}, the model's vocabulary has 10"
    with pytest.raises(CalibrationError, match=message):
        make(items, vocab_size=10)
    make([*items[:1], [9, 0]] if kind == "ids" else items[:1], vocab_size=10)


@pytest.mark.parametrize("tokenizer", [Decoder(), Encoder()], ids=["decoder", "encoder"])
def test_text_of_another_tokenizer_is_noticed_by_its_ids(tokenizer):
    with pytest.raises(CalibrationError, match="was another tokenizer used"):
        make(["70 8 9"], tokenizer, vocab_size=10)
