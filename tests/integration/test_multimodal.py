"""Models with an encoder beside the text model, or with parts that the data don't use."""

import re

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hf_sparse
from hf_sparse import CalibrationError, SparseConfig


def tiny_llava() -> LlavaForConditionalGeneration:
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, vocab_size=61, pad_token_id=0)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    ).eval()


def test_an_encoder_that_the_data_cannot_reach_stays_dense_and_one_warning_says_why(caplog):
    model = tiny_llava()
    encoder = {n: t.clone() for n, t in model.state_dict().items() if "vision_tower" in n}
    data = [{"input_ids": torch.randint(1, 60, (1, 8))}]
    report = hf_sparse.prune(model, SparseConfig(dataset=data))
    assert {layer.name.split(".")[1] for layer in report.layers} == {"language_model"}
    projector = report.left_dense["model.multi_modal_projector.linear_1"]
    assert projector == "no calibration token reached it"
    words = r"model\.vision_tower\S* \(CLIP\w+\) needs pixel_values, the data have input_ids"
    dense = [why for name, why in report.left_dense.items() if "vision_tower" in name]
    assert len(dense) > 10
    assert all(re.search(words, why) for why in dense if "kernel" not in why)
    (told,) = [r.getMessage() for r in caplog.records if "stay dense" in r.getMessage()]
    assert re.search(words, told)
    assert "Pass dicts of all inputs" in told
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in encoder.items())


def test_a_model_of_which_the_data_reach_nothing_that_is_to_be_pruned_is_an_error():
    data = [{"input_ids": torch.randint(1, 60, (1, 8))}]
    config = SparseConfig(dataset=data, targets=["vision_tower"])
    with pytest.raises(CalibrationError, match=r"needs pixel_values.*no other layer was to be"):
        hf_sparse.prune(tiny_llava(), config)


def test_pixels_of_another_dtype_than_the_model_reach_every_part():
    model = tiny_llava().bfloat16()
    ids = torch.cat([torch.full((2, 4), 60), torch.randint(1, 60, (2, 8))], dim=1)
    data = [{"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}]
    report = hf_sparse.prune(model, SparseConfig(dataset=data))
    parts = {layer.name.split(".")[1] for layer in report.layers}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}


def test_cross_attention_without_an_encoder_stays_dense(token_ids):
    config = BartConfig(
        vocab_size=61, d_model=24, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=40, max_position_embeddings=32, is_encoder_decoder=False,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    report = hf_sparse.prune(model, SparseConfig(dataset=list(token_ids)))
    never = {n for n, why in report.left_dense.items() if "no calibration token" in why}
    expected = {f"model.decoder.layers.0.encoder_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    assert never == expected
    assert len(report.layers) == 6
