"""What a processor gets of a row, and what it doesn't, in words."""

import io

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import WhisperFeatureExtractor

from hf_sparse.calibration.batches import make_batches
from hf_sparse.calibration.items import column_kinds
from hf_sparse.calibration.processor_rows import inputs_of
from hf_sparse.core.errors import CalibrationError

RED = Image.new("RGB", (2, 1), (255, 0, 0))
GREY = Image.new("L", (1, 1), 7)
SOUND = {"array": [0.0, 0.5], "sampling_rate": 4}
CHAT = [{"role": "user", "content": "5 6"}, {"role": "assistant", "content": "7"}]


class Tokenizer:
    """Ids are the text's numbers; a conversation is its contents in a row, behind BOS."""

    bos_token, bos_token_id, eos_token_id, all_special_ids = "1 ", 1, 2, (1, 2)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if text == "refused":
            raise ValueError("not this one")
        return {"input_ids": [int(word) if word.isdigit() else 99 for word in text.split()]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return self.bos_token + " ".join(message["content"] for message in messages)


class Images:
    """Gives the pixels of the first image, and how many there are."""

    def __call__(self, images, return_tensors=None):
        assert return_tensors == "pt"
        pixels = torch.from_numpy(np.array(images[0])).float()[None]
        return {"pixel_values": pixels, "number": torch.tensor([len(images)]), "size": "none"}


class Sounds:
    sampling_rate = 4

    def __call__(self, raw_speech, sampling_rate=None, return_tensors=None):
        assert sampling_rate == 4
        return {"input_features": torch.tensor(np.stack(raw_speech))}


class Processor:
    """Images beside text, as processors are made of parts."""

    def __init__(self):
        self.image_processor, self.tokenizer = Images(), Tokenizer()

    def __call__(self, images=None, text=None, return_tensors=None):
        assert len(text) == 1
        ids = torch.tensor([self.tokenizer(text[0])["input_ids"]])
        if images is None:
            return {"input_ids": ids}
        return {"input_ids": ids, **self.image_processor(images, return_tensors)}


def batches(rows, processor, **changes):
    settings = {"num_samples": 9, "seq_len": 2, "batch_size": 1, "seed": 0, "vocab_size": None}
    return make_batches(iter(rows), lambda: processor, **settings | changes).batches


def test_columns_are_told_by_their_values():
    row = {
        "a": RED,
        "b": [RED, GREY],
        "c": SOUND,
        "d": "text",
        "e": CHAT,
        "f": 3,
        "g": [1, 2],
        "h": None,
        "i": [],
        "j": {"array": [0.0]},
        "k": [{"role": "user"}],
    }
    expected = ["images", "images", "audio", "text", "conversation"]
    assert column_kinds(row) == dict(zip("abcde", expected, strict=True))


@pytest.mark.parametrize(
    ("processor", "inputs"),
    [
        (Images(), ["images"]),
        (Sounds(), ["audio"]),
        (WhisperFeatureExtractor(), ["audio"]),
        (Tokenizer(), ["text"]),
        (Processor(), ["images", "text"]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_inputs_are_told_by_the_parts_or_the_call(processor, inputs):
    assert inputs_of(processor) == inputs


@pytest.mark.parametrize("thing", [object(), lambda pixels: pixels, lambda: None])
def test_what_is_no_processor_is_an_error(thing):
    with pytest.raises(CalibrationError, match=f"tokenizer={type(thing).__name__} is neither"):
        batches([{"image": RED}], thing)


def test_images_become_rgb_and_other_columns_and_outputs_are_left_out():
    rows = [{"picture": RED, "label": 3, "caption": "a", "title": "b"}, {"picture": GREY}]
    red, grey = batches(rows, Images())
    assert red["pixel_values"].tolist() == [[[[255, 0, 0], [255, 0, 0]]]]
    assert grey["pixel_values"].tolist() == [[[[7, 7, 7]]]]
    assert sorted(red) == ["number", "pixel_values"]
    (several,) = batches([{"pictures": [RED, GREY]}], Images())
    assert several["number"].tolist() == [2]


def test_rows_of_one_shape_share_a_batch():
    shapes = [(1, 1), (1, 1), (1, 1), (2, 1), (2, 1), (1, 1)]
    rows = [{"image": Image.new("RGB", shape)} for shape in shapes]
    found = batches(rows, Images(), batch_size=2)
    assert [tuple(batch["pixel_values"].shape) for batch in found] == [
        (2, 1, 1, 3),
        (1, 1, 1, 3),
        (2, 1, 2, 3),
        (1, 1, 1, 3),
    ]
    assert [len(batch["number"]) for batch in batches(rows, Images(), num_samples=2)] == [1, 1]


def test_of_several_columns_the_usual_name_counts():
    (batch,) = batches([{"mask": GREY, "image": RED, "id": "x", "text": "5 6"}], Processor())
    assert batch["pixel_values"].shape == (1, 1, 2, 3)
    assert batch["input_ids"].tolist() == [[5, 6]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"mask": GREY, "photo": RED}, "'mask' and 'photo' .* the images of Processor: .* 'image'"),
        ({"id": "1", "caption": "2"}, "'id' and 'caption' .* the text of Processor: .* 'text'"),
        ({"a": CHAT, "b": CHAT}, "'a' and 'b' .* the text of Processor: .* 'messages'"),
        ({"sound": SOUND, "n": 3}, r"takes images and text, .* 'sound' \(audio\), 'n' \(int\)"),
    ],
    ids=["images", "text", "conversations", "none"],
)
def test_columns_that_leave_the_choice_open_are_named(row, words):
    with pytest.raises(CalibrationError, match=words):
        batches([row], Processor())


def test_without_a_processor_the_columns_are_named():
    with pytest.raises(CalibrationError, match=r"rows have 'image' \(images\), and no processor"):
        batches([{"image": RED}], None)


def test_a_conversation_goes_before_text_and_is_rendered_without_its_bos():
    (batch,) = batches([{"image": RED, "text": "9", "messages": CHAT}], Processor())
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    # Without images it is text like any other: packed behind BOS.
    for processor in (Processor(), Tokenizer()):
        found = batches([{"messages": CHAT, "id": "9"}] * 2, processor)
        ids = [batch["input_ids"].tolist() for batch in found]
        assert ids == [[[1, 5]], [[6, 7]], [[1, 5]], [[6, 7]]]


def test_a_tokenizer_reads_the_text_beside_an_image():
    (batch,) = batches([{"image": RED, "text": "5"}], Tokenizer())
    assert batch["input_ids"].tolist() == [[1, 5]]


def test_sound_of_another_rate_is_an_error_that_tells_how_to_resample():
    (batch,) = batches([{"speech": SOUND}], Sounds())
    assert batch["input_features"].tolist() == [[0.0, 0.5]]
    wrong = {"speech": SOUND | {"sampling_rate": 8}}
    words = r"item 1 .* 8 Hz .* Sounds expects 4 Hz: dataset.cast_column\('speech', Audio"
    with pytest.raises(CalibrationError, match=words):
        batches([{"speech": SOUND}, wrong], Sounds())


@pytest.mark.parametrize("bad", [{"image": None}, {}, "text"], ids=str)
def test_a_row_that_lacks_its_column_is_named(bad):
    words = "item 1 of the dataset has a NoneType in column 'image', where the first one has images"
    with pytest.raises(CalibrationError, match=words):
        batches([{"image": RED}, bad], Images())


def test_what_the_processor_refuses_is_named():
    words = r"Processor can't process item 0 of the dataset \(columns image, text\): not this one"
    with pytest.raises(CalibrationError, match=words):
        batches([{"image": RED, "text": "refused"}], Processor())


def test_a_chat_without_a_template_is_an_error():
    class Mute(Tokenizer):
        def apply_chat_template(self, messages, tokenize):
            raise ValueError("chat_template is not set")

    with pytest.raises(CalibrationError, match="which Mute can't render: chat_template is not set"):
        batches([{"messages": CHAT}], Mute())


def test_text_takes_a_tokenizer():
    with pytest.raises(CalibrationError, match="the dataset is text, and only a Images came"):
        batches(["5 6"], Images())


SHARED = [{"from": "human", "value": "5 6"}, {"from": "gpt", "value": "7"}]
ALPACA = {"instruction": "5", "input": "6", "output": "7"}


class Roles(Tokenizer):
    """Its template writes a role as a number, and refuses one that it doesn't know."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize):
        known = {"user": 3, "assistant": 4, "system": 8, "tool": 9}
        for message in messages:
            if message["role"] not in known:
                raise jinja2.TemplateError(f"no role {message['role']}")
        return " ".join(f"{known[m['role']]} {m['content']}" for m in messages)


PART = {"type": "text", "text": "5"}


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"conversations": SHARED, "id": "x"}, [3, 5, 6, 4, 7]),
        ({"conversations": [{"from": "system", "value": "5"}, *SHARED]}, [8, 5, 3, 5, 6, 4, 7]),
        ({"messages": [{"role": "user", "content": "5"}]}, [3, 5]),
        (ALPACA, [3, 5, 6, 4, 7]),
        (ALPACA | {"input": ""}, [3, 5, 4, 7]),
        ({"instruction": "5", "output": "7"}, [3, 5, 4, 7]),
        ({"prompt": "5", "completion": "7", "source": "z"}, [3, 5, 4, 7]),
        ({"prompt": "5", "response": "7"}, [3, 5, 4, 7]),
        ({"instruction": "5", "context": "6", "response": "7", "category": "z"}, [3, 5, 6, 4, 7]),
        (ALPACA | {"text": "9 9"}, [9, 9]),
        ({"messages": [{"role": "user", "content": [PART, PART]}]}, [3, 55]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_conversations_of_every_make_go_through_the_template(row, ids):
    found = batches([row], Roles(), seq_len=len(ids) + 1)
    assert found[0]["input_ids"].tolist() == [[1, *ids]]


def test_a_part_that_a_tokenizer_s_template_can_not_take_is_an_error():
    row = {"messages": [{"role": "user", "content": [PART, {"type": "image"}]}]}
    with pytest.raises(
        CalibrationError, match=r"item 0.*type 'image' is no text: pass a processor"
    ):
        batches([row], Roles())


def test_a_row_without_the_first_one_s_column_is_named_and_not_left_out_as_blank():
    rows = [{"messages": [{"role": "user", "content": "5"}]}, {"text": "6 7 8"}]
    with pytest.raises(CalibrationError, match=r"item 1 of the dataset has .* 'messages'"):
        batches(rows, Roles(), seq_len=3)


def test_a_dialogue_without_a_template_is_its_parts_in_a_row():
    (batch,) = batches([ALPACA], Tokenizer(), seq_len=4)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7]]


def test_a_template_that_refuses_a_row_is_an_error_that_names_it():
    row = {"messages": [{"role": "judge", "content": "5"}]}
    good = {"messages": [{"role": "user", "content": "5"}]}
    words = "item 2 of the dataset is a conversation, which Roles can't render: no role judge"
    with pytest.raises(CalibrationError, match=words):
        batches([good, good, row], Roles())
    # The user's own number, not that of the draw.
    data = [good] * 30 + [row]
    with pytest.raises(CalibrationError, match="item 30 "):
        make_batches(
            data,
            Roles,
            num_samples=31,
            seq_len=3,
            batch_size=1,
            seed=3,
            vocab_size=None,
        )


@pytest.mark.parametrize("empty", [{"messages": []}, {"messages": None}])
def test_empty_conversations_are_left_out_also_at_the_beginning(empty):
    rows = [empty, {"messages": CHAT}, empty, {"messages": CHAT}]
    assert [b["input_ids"].tolist() for b in batches(rows, Tokenizer())] == [
        [[1, 5]],
        [[6, 7]],
        [[1, 5]],
        [[6, 7]],
    ]


def test_a_row_without_the_first_one_s_dialogue_is_named():
    with pytest.raises(CalibrationError, match=r"item 1 .* no text in its columns instruction and"):
        batches([ALPACA, {"instruction": "5", "output": 7}], Tokenizer())


def test_an_image_that_can_not_be_decoded_is_an_error_that_names_the_item():
    whole = io.BytesIO()
    Image.new("RGB", (40, 40)).save(whole, "png")
    broken = Image.open(io.BytesIO(whole.getvalue()[:60]))
    with pytest.raises(CalibrationError, match=r"can't process item 1 of .* image\).*truncated"):
        batches([{"image": RED}, {"image": broken}], Images())
