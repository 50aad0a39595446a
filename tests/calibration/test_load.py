"""Calibration data against what a model, and the machine, can take."""

from collections import namedtuple

import pytest
import torch
import transformers

from hf_sparse import SparseConfig
from hf_sparse.calibration import load as calibration_load
from hf_sparse.calibration.load import load_calibration
from hf_sparse.core.errors import CalibrationError, ConfigError

Memory = namedtuple("Memory", "available")


def load(model, samples, **arguments):
    return load_calibration(model, SparseConfig(dataset=samples, **arguments), lambda: None)


def test_two_sets_of_hidden_states_that_do_not_fit_are_refused(tiny, monkeypatch):
    samples = [torch.arange(1, 11) for _ in range(6)]
    needed = 2 * 60 * tiny.config.hidden_size * 4
    monkeypatch.setattr(calibration_load.psutil, "virtual_memory", lambda: Memory(needed - 1))
    with pytest.raises(CalibrationError, match=r"target='dense'.*60 calibration.*target='layer'"):
        load(tiny, samples, target="dense")
    assert len(load(tiny, samples).batches) == 6
    monkeypatch.setattr(calibration_load.psutil, "virtual_memory", lambda: Memory(needed))
    assert len(load(tiny, samples, target="dense").batches) == 6


def test_half_precision_needs_half_the_room(tiny, monkeypatch):
    samples = [torch.arange(1, 11) for _ in range(6)]
    needed = 2 * 60 * tiny.config.hidden_size * 2
    monkeypatch.setattr(calibration_load.psutil, "virtual_memory", lambda: Memory(needed))
    assert len(load(tiny.bfloat16(), samples, target="dense").batches) == 6


def test_a_method_without_data_loads_none(tiny):
    assert load_calibration(tiny, SparseConfig(method="magnitude"), lambda: None) is None


def test_samples_longer_than_the_model_are_refused(tiny):
    longest = tiny.config.max_position_embeddings
    with pytest.raises(ConfigError, match=f"seq_len={longest + 1} is longer than the {longest}"):
        load(tiny, [torch.arange(4)], seq_len=longest + 1)


def test_the_config_s_documents_are_joined_if_it_says_so(trained, tokenizer):
    rows = ["Some words of it .\n", "", "And more of them .\n"] * 8
    apart, joined = (
        load_calibration(
            trained,
            SparseConfig(dataset=rows, seq_len=16, join_documents=join),
            lambda: tokenizer,
        )
        for join in (False, True)
    )
    blank_lines = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert blank_lines[0] in joined.batches[0]["input_ids"]
    assert joined.record.digest != apart.record.digest


# With the padding's row these tables have 40 rows for 38 tokens.
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("name", "longest"),
    [("Roberta", 38), ("MPNet", 38), ("IBert", 38), ("Bert", 40), ("Llama", 40)],
)
def test_the_longest_sequence_is_what_the_position_embedding_has_rows_for(name, longest):
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 5))
    long = torch.arange(2, 60)
    (batch,) = load(model, [long]).batches
    assert batch["input_ids"].shape == (1, longest)
    with pytest.raises(ConfigError, match=f"seq_len={longest + 1} is longer than the {longest}"):
        load(model, [long], seq_len=longest + 1)


def test_a_text_is_no_longer_than_the_decoder_s_positions_allow_either():
    config = transformers.LEDConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, attention_window=4,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=16,
    )  # fmt: skip
    (batch,) = load(transformers.LEDForConditionalGeneration(config), [torch.arange(2, 60)]).batches
    assert batch["input_ids"].shape == (1, 16)
