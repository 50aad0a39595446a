"""Inputs that single model types take besides, or instead of, what their parameters' names tell.

Each function gets the config and the inputs so far and returns inputs to add; None drops one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Extra = Callable[[Any, dict[str, Any]], dict[str, Any]]


def _codebooks(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": inputs["input_ids"].repeat(config.num_codebooks, 1)}


def _fuyu(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"].clone()
    ids[:, :4] = config.image_token_id
    patch = config.patch_size
    return {
        "input_ids": ids,
        "pixel_values": None,
        "image_patches": torch.randn(2, 4, config.num_channels * patch * patch),
    }


def _gemma4(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    vision = config.vision_config
    no_audio = {"input_features": None, "input_features_mask": None}
    if vision is None:
        return {"pixel_values": None, **no_audio}
    side = torch.arange(4)
    positions = torch.cartesian_prod(side, side).expand(2, 16, 2)
    values = torch.rand(2, 16, 3 * vision.patch_size**2)
    return {"pixel_values": values, "image_position_ids": positions, **no_audio}


def _idefics(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "pixel_values": inputs["pixel_values"].reshape(2, 1, *inputs["pixel_values"].shape[-3:]),
        "image_attention_mask": torch.ones(2, 16, 1, dtype=torch.int64),
    }


def _kosmos2(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    mask = torch.zeros(2, 16, dtype=torch.int64)
    mask[:, : config.latent_query_num] = 1
    return {"image_embeds_position_mask": mask}


def _kosmos2_5(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    width = config.vision_config.patch_embed_hidden_size
    return {**_kosmos2(config, inputs), "flattened_patches": _flattened(width)}


def _flattened(width: int) -> torch.Tensor:
    """16 patches behind their row and column, counted from 1."""
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).expand(2, 16, 2)
    return torch.cat([places.float(), torch.randn(2, 16, width)], dim=-1)


def _mllama(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    tiles = config.vision_config.max_num_tiles
    size = inputs["pixel_values"].shape[-3:]
    return {
        "pixel_values": torch.randn(2, 1, tiles, *size),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.int64),
        "cross_attention_mask": torch.ones(2, 16, 1, tiles, dtype=torch.int64),
    }


def _molmo2(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Two images of 16 patches, pooled by four."""
    vision = config.vision_config
    width = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(2, 16, width),
        "image_token_pooling": torch.arange(16).reshape(4, 4).repeat(2, 1),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
        "image_num_crops": torch.tensor([1, 1]),
    }


def _blocks(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pieces of an image that become a token each, their channels last."""
    vision = config.vision_config
    side = vision.patch_size * getattr(vision, "spatial_merge_size", 1)
    times = getattr(vision, "temporal_patch_size", None)
    count = int(inputs["image_grid_thw"].prod(-1).sum()) if "image_grid_thw" in inputs else 8
    shape = (count, *([times] if times else []), side, side, vision.num_channels)
    return {"pixel_values": torch.randn(shape)}


def _qwen2_audio(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A token for four frames."""
    ids = inputs["input_ids"]
    audio = torch.full((2, inputs["input_features"].shape[-1] // 4), config.audio_token_id)
    return {"input_ids": torch.cat([ids[:, :4], audio, ids[:, 4:]], dim=1)}


def _patches(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    patch = config.vision_config.patch_size
    return {"pixel_values": inputs["pixel_values"].reshape(-1, 3, patch, patch)}


EXTRA_INPUTS: dict[str, Extra] = {
    "evolla": lambda config, inputs: {
        "protein_input_ids": inputs["input_ids"] % 20 + 4,
        "protein_attention_mask": torch.ones_like(inputs["input_ids"]),
    },
    "dia": lambda config, inputs: {
        "decoder_input_ids": torch.randint(3, 99, (2, 8, config.decoder_config.num_channels))
    },
    "deepseek_vl_hybrid": lambda config, inputs: {
        "high_res_pixel_values": torch.randn(2, 3, *[config.high_res_vision_config.image_size] * 2)
    },
    "dots3_note": lambda config, inputs: {
        "chunk_sample_lengths": torch.tensor(
            [inputs["input_features"].shape[-1] * config.audio_config.hop_length] * 2
        )
    },
    "fuyu": _fuyu,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4,
    "granite_docling": lambda config, inputs: {
        "pixel_values": inputs["pixel_values"].reshape(2, 1, *inputs["pixel_values"].shape[-3:]),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    },
    "granite_speech5_ctc": lambda config, inputs: {"input_features": torch.randn(2, 64, 320)},
    "idefics": _idefics,
    "inkling2": _blocks,
    "inkling_mm_model": _blocks,
    "instructblip": lambda config, inputs: {"qformer_input_ids": inputs["input_ids"][:, :8]},
    "instructblipvideo": lambda config, inputs: {
        "qformer_input_ids": inputs["input_ids"][:, :8],
        "pixel_values": torch.randn(2, 4, *inputs["pixel_values"].shape[-3:]),
    },
    "kimi_k25": _patches,
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos2_5,
    "mllama": _mllama,
    "mllama_text_model": lambda config, inputs: {
        "cross_attention_states": torch.randn(2, 4, config.hidden_size)
    },
    "kyutai_speech_to_text": lambda config, inputs: {
        "input_ids": inputs["input_ids"][..., None].expand(2, 16, config.num_codebooks + 1),
        "input_values": None,
    },
    "molmo2": _molmo2,
    "nemotron_h_omni": lambda config, inputs: {
        "pixel_values": torch.randn(32, 3 * config.vision_config.patch_size**2),
        "image_grid_hw": torch.tensor([[4, 4]] * 2),
        "input_features": None,  # its default has no audio tower
        "input_features_mask": None,
    },
    "pi0": lambda config, inputs: {
        "state": torch.randn(2, config.max_state_dim),
        "noise": torch.randn(2, config.chunk_size, config.max_action_dim),
        "timestep": torch.rand(2),
        "pixel_values": inputs["pixel_values"].reshape(2, 1, *inputs["pixel_values"].shape[-3:]),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    },
    "pop2piano": lambda config, inputs: {"input_features": torch.randn(2, 16, config.d_model)},
    "qwen2_audio": _qwen2_audio,
    "voxtral_realtime": lambda config, inputs: {
        "input_ids": inputs["input_ids"][
            :, : min(inputs["input_features"].shape[1:]) // config.audio_length_per_tok
        ]
    },
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "paddleocr_vl": _patches,
    "pix2struct": lambda config, inputs: {
        "flattened_patches": _flattened(config.vision_config.patch_embed_hidden_size)
    },
    "speech-encoder-decoder": lambda config, inputs: {"input_features": None},
    "video_llama_3": lambda config, inputs: {"image_merge_sizes": torch.tensor([1, 1])},
    "video_llava": lambda config, inputs: {
        "pixel_values_images": inputs.get("pixel_values", torch.randn(2, 3, 32, 32)),
    },
}
