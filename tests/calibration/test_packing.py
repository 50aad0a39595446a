"""Texts become samples: blank ones left out, each tokenizer's way found, joined as in papers."""

import itertools
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_sparse.calibration.batches import make_batches
from hf_sparse.core.errors import CalibrationError


def tokenizer_of(words, unknown="[UNK]", closing=None, **names):
    """Knows the letters of `words` and nothing else; closes a text with `closing`."""
    vocabulary = {word: i for i, word in enumerate([*words, *filter(None, (unknown, closing))])}
    made = Tokenizer(models.WordLevel(vocabulary, **{"unk_token": unknown} if unknown else {}))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if closing:
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {closing}", special_tokens=[(closing, vocabulary[closing])]
        )
        names["sep_token"] = closing
    known = {"unk_token": unknown} if unknown else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, **known, **names)


def make(dataset, tokenizer, **changes):
    settings = {"num_samples": 64, "seq_len": 4, "batch_size": 1, "seed": 0, "vocab_size": None}
    return make_batches(dataset, lambda: tokenizer, **settings | changes)


def ids_of(data):
    return [row for batch in data.batches for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("text", ["ACGT" * 500, "NACGT" * 400], ids=["known", "unknown letters"])
def test_a_tokenizer_that_knows_no_usual_letter_is_packed(text):
    assert make([text], tokenizer_of("ACGT"), seq_len=128).record.count == 2000 // 128


def test_one_that_closes_texts_gets_a_sample_each_also_of_texts_that_end_in_unknown():
    tokenizer = tokenizer_of("ACGT", closing="[SEP]")
    assert ids_of(make(iter(["AC", "AN"]), tokenizer)) == [[0, 1, 5], [0, 4, 5]]


def test_texts_cut_by_one_that_closes_them_are_told(caplog):
    tokenizer = tokenizer_of("ACGT", closing="[SEP]")
    with caplog.at_level(logging.WARNING):
        assert ids_of(make(["ACGT" * 9, "A"], tokenizer, num_samples=2))
        assert not caplog.messages
        make(["ACGT" * 9, "A"], tokenizer)
    assert "1 texts of dataset list may be longer than seq_len=4" in caplog.text


def test_text_that_the_tokenizer_does_not_know_is_told_once(caplog):
    make(["hello there", "world"] * 9, tokenizer_of("ACGT"))
    (message,) = caplog.messages
    assert "doesn't know 144 of the 144 tokens of dataset list" in message


def test_text_that_the_tokenizer_refuses_is_an_error_that_names_the_item():
    words = "PreTrainedTokenizerFast can't read item 1 of the dataset: .*unk|UNK"
    with pytest.raises(CalibrationError, match=words):
        make(iter(["ACGT", "hello"]), tokenizer_of("ACGT", unknown=None))


def test_blank_rows_are_left_out_and_counted(caplog, tokenizer):
    texts = ["", "one two three", " \n", None, "four five six"]
    found = ids_of(make(iter(texts), tokenizer, seq_len=3))
    assert found == ids_of(make(iter([texts[1], texts[4]]), tokenizer, seq_len=3))
    assert "3 texts of dataset list_iterator are blank and were left out" in caplog.text


@pytest.mark.parametrize("blank", ["", None, {"text": ""}, {"text": None}, {"messages": []}])
def test_nothing_but_blank_rows_is_an_error(blank, tokenizer):
    with pytest.raises(CalibrationError, match="list has no text in it"):
        make([blank] * 30, tokenizer)


# --- joined ---------------------------------------------------------------------------------


def blocks(tokenizer, texts, seq_len):
    """As the papers' code has it."""
    stream = tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"][0]
    return [stream[i * seq_len :][:seq_len].tolist() for i in range(len(stream) // seq_len)]


ROWS = ["", " = A title = \n", "", "Some words of it .\n", "", "And more of them .\n"] * 20


@pytest.mark.parametrize("rows", [ROWS, [{"text": row} for row in ROWS]], ids=["texts", "rows"])
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_joined_documents_are_the_papers_stream(tokenizer, rows, lazily, seed):
    data = make(
        iter(rows) if lazily else rows, tokenizer, seq_len=16, seed=seed, join_documents=True
    )
    assert ids_of(data) == blocks(tokenizer, ROWS, 16)


def test_a_seed_draws_from_the_blocks_of_joined_documents(tokenizer):
    every = blocks(tokenizer, ROWS, 16)
    first, again, other = (
        ids_of(make(ROWS, tokenizer, seq_len=16, num_samples=5, seed=seed, join_documents=True))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert [every.index(block) for block in first] == sorted(every.index(b) for b in first)


def test_of_an_endless_stream_no_more_is_joined_than_can_be_needed(tokenizer):
    rows = ("word " * 20 for _ in itertools.count())
    data = make(rows, tokenizer, seq_len=16, num_samples=5, join_documents=True)
    assert data.record.count == 5


def test_too_little_to_join_is_an_error(tokenizer):
    with pytest.raises(CalibrationError, match="fewer than one sequence of 16"):
        make(["one", "two"], tokenizer, seq_len=16, join_documents=True)
