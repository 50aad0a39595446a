"""Models with more than one tower, or with parts that the data don't use."""

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


def test_a_tower_without_its_input_is_named_before_anything_is_changed():
    model = tiny_llava()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": torch.randint(1, 60, (1, 8))}]
    message = (
        r"the tower model\.vision_tower\S* \(CLIP\w+\) needs pixel_values.*data have input_ids"
    )
    with pytest.raises(CalibrationError, match=message):
        hf_sparse.prune(model, SparseConfig(dataset=data))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = SparseConfig(dataset=data, modules_to_not_convert=["vision_tower", "lm_head"])
    report = hf_sparse.prune(model, config)
    assert {layer.name.split(".")[1] for layer in report.layers} == {"language_model"}
    assert "never called" in report.left_dense["model.multi_modal_projector.linear_1"]


def test_pixels_of_another_dtype_than_the_model_reach_every_tower():
    model = tiny_llava().bfloat16()
    ids = torch.cat([torch.full((2, 4), 60), torch.randint(1, 60, (2, 8))], dim=1)
    data = [{"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}]
    report = hf_sparse.prune(model, SparseConfig(dataset=data))
    towers = {layer.name.split(".")[1] for layer in report.layers}
    assert towers == {"vision_tower", "multi_modal_projector", "language_model"}


def test_cross_attention_without_an_encoder_stays_dense(token_ids):
    config = BartConfig(
        vocab_size=61, d_model=24, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=40, max_position_embeddings=32, is_encoder_decoder=False,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    report = hf_sparse.prune(model, SparseConfig(dataset=list(token_ids)))
    never = {n for n, why in report.left_dense.items() if "never called" in why}
    expected = {f"model.decoder.layers.0.encoder_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    assert never == expected
    assert len(report.layers) == 6
