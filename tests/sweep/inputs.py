"""Random model inputs, chosen by what a model's forward takes.

Some inputs come in more than one layout (frames or mel bins first, one image or a list of them).
The names don't tell which, so the layouts are tried in turn; the first with which the model runs
is the one.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from extras import EXTRA_INPUTS
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Inputs = dict[str, Tensor]
BATCH, TOKENS, FRAMES, SAMPLES = 2, 16, 200, 9600
IMAGE_LAYOUTS = ("image", "sized image", "images", "sized images", "sized tiles", "patches")
AUDIO_LAYOUTS = ("bins first", "frames first", "frames first, no mask")
AUDIO_LAYOUTS += ("short, bins first", "short, frames first")
WAVE_LAYOUTS = ("wave", "wave of one channel")
MEL_BINS = (
    "num_mel_bins",
    "feature_projection_input_dim",
    "input_feat_per_channel",
    "input_dim",
    "feature_size",
)
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index")


def find_inputs(model: PreTrainedModel) -> Callable[[int], Inputs]:
    """A function from seeds to inputs with which the model runs.

    Raises:
        Exception: what the model raised on the first layout, if it runs on none.
    """
    errors: list[Exception] = []
    for layout in _layouts(model):
        make = partial(random_inputs, model, *layout)
        try:
            with torch.no_grad():
                model(**make(0))
            return make
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _layouts(model: PreTrainedModel) -> Iterator[tuple[str, str, bool]]:
    names = _names(model)
    images = IMAGE_LAYOUTS if "pixel_values" in names else IMAGE_LAYOUTS[:1]
    if "image_grid_thw" in names:
        images = ("patches",)
    elif "spatial_shapes" in names:
        images = ("padded patches",)
    audio = (
        AUDIO_LAYOUTS if names & {"input_features", "audio_input_features"} else AUDIO_LAYOUTS[:1]
    )
    if "input_values" in names:
        audio = WAVE_LAYOUTS
    plain = list(itertools.product(images, audio, [False]))
    yield from plain
    if "attention_mask" in names:
        yield from [(images, audio, True) for images, audio, _ in plain]


def _names(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def random_inputs(
    model: PreTrainedModel, images: str, audio: str, masked: bool, seed: int
) -> Inputs:
    """One batch; `images` and `audio` are layouts; with a mask of all tokens if it is to be."""
    generator = torch.Generator().manual_seed(seed)
    names = _names(model)
    config = model.config
    inputs: Inputs = {}
    vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None) or 99
    plain = torch.tensor(sorted({*range(5, min(99, vocabulary))} - _special_ids(config)))
    text = plain[torch.randint(len(plain), (BATCH, TOKENS), generator=generator)]
    if "pixel_values" in names:
        inputs |= _images(config, names, images, generator)
    if "input_features" in names:
        inputs |= _mel(config, names, audio, generator)
    if "input_values" in names:
        channels = (1,) if audio.endswith("channel") else ()
        inputs["input_values"] = torch.randn(BATCH, *channels, SAMPLES, generator=generator)
        if "padding_mask" in names:
            inputs["padding_mask"] = torch.ones(BATCH, SAMPLES, dtype=torch.bool)
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(BATCH, TOKENS, 4, dtype=torch.int64)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = text[:, :8]
    if "input_ids" in names and not (config.is_encoder_decoder and "input_features" in inputs):
        inputs["input_ids"] = text
    inputs |= EXTRA_INPUTS.get(config.model_type, lambda config, inputs: {})(config, inputs)
    inputs = {key: value for key, value in inputs.items() if value is not None}
    if "input_ids" in inputs:
        inputs["input_ids"] = _with_placeholders(model, inputs)
        if masked:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    image = _id(config, IMAGE_TOKENS)
    if "pixel_values" in inputs and image is not None:
        for name in names & {"mm_token_type_ids", "moe_mm_token_type_ids"}:
            inputs[name] = (inputs["input_ids"] == image).long()
    return inputs


def _images(
    config: PreTrainedConfig, names: set[str], layout: str, generator: torch.Generator
) -> Inputs:
    vision = _vision(config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    size = getattr(vision, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    if layout == "patches":
        patch = getattr(vision, "patch_size", 8)
        merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", 1)
        times = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
        side = 2 * merge if isinstance(merge, int) else 4
        length = channels * times * patch * patch
        values = torch.randn(BATCH * side * side, length, generator=generator)
        return {
            "pixel_values": values,
            "image_grid_thw": torch.tensor([[1, side, side]] * BATCH),
        }
    if layout == "padded patches":
        length = channels * vision.patch_size**2
        return {
            "pixel_values": torch.randn(BATCH, 16, length, generator=generator),
            "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
            "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.int64),
        }
    middle = {"images": (1,), "tiles": (2,)}.get(layout.removeprefix("sized "), ())
    shape = (BATCH, *middle, channels, height, width)
    inputs = {"pixel_values": torch.randn(shape, generator=generator)}
    if layout.startswith("sized") and "image_sizes" in names:
        inputs["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    return inputs


def _mel(
    config: PreTrainedConfig, names: set[str], layout: str, generator: torch.Generator
) -> Inputs:
    found = [(c, getattr(c, n)) for c in _configs(config) for n in MEL_BINS if hasattr(c, n)]
    audio, bins = found[0] if found else (config, 80)
    bins *= getattr(audio, "num_stacked_frames", 1)
    positions = getattr(audio, "max_source_positions", None)
    frames = 2 * positions if positions and layout == "bins first" else FRAMES
    if layout.startswith("short"):
        frames = (getattr(audio, "max_position_embeddings", None) or FRAMES) - 8
    layout = layout.removeprefix("short, ")
    shape = (BATCH, bins, frames) if layout == "bins first" else (BATCH, frames, bins)
    masks = names & {"input_features_mask", "feature_attention_mask", "padding_mask"}
    masks = set() if layout.endswith("no mask") else masks
    return {
        "input_features": torch.randn(shape, generator=generator),
        **{name: torch.ones(BATCH, frames, dtype=torch.int64) for name in masks},
    }


def _with_placeholders(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Token ids with as many image and audio tokens as the towers give."""
    ids = inputs["input_ids"]
    for main, tokens, get in (
        ("pixel_values", IMAGE_TOKENS, "get_image_features"),
        ("input_features", AUDIO_TOKENS, "get_audio_features"),
        ("input_values", AUDIO_TOKENS, "get_audio_features"),
    ):
        token = _id(model.config, tokens)
        if main not in inputs or token is None:
            continue
        count = _feature_count(model, get, inputs)
        ids = torch.cat([ids, torch.full((BATCH, count // BATCH), token)], dim=1)
        ids = torch.cat([ids[:, :4], ids[:, TOKENS:], ids[:, 4:TOKENS]], dim=1)
    return ids


def _feature_count(model: PreTrainedModel, get: str, inputs: Inputs) -> int:
    owners = [m for m in (model, model.base_model) if hasattr(m, get)]
    if not owners:
        return 0
    method = getattr(owners[0], get)
    names = {name for m in owners for name in inspect.signature(getattr(m, get)).parameters}
    names |= _names(model) - {"input_ids"} if "args" in names else set()
    wanted = {key: value for key, value in inputs.items() if key in names}
    try:
        with torch.no_grad():
            features: Any = method(**wanted)
    except ValueError as error:  # it wants the ids with as many tokens as it says
        said = re.search(r"features:? (\d+)", str(error))
        if said is None:
            raise
        return int(said[1])
    if not isinstance(features, Tensor | list | tuple) or hasattr(features, "pooler_output"):
        pooled, last = (features.get(k) for k in ("pooler_output", "last_hidden_state"))
        layers = features.get("deepstack_features")  # (layer, of each image)
        found = (f for f in (pooled, last, layers and layers[0][1]) if f is not None)
        features = next(found)
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.shape[:-1].numel() for part in parts)


def _id(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    found = (getattr(c, name, None) for c in _configs(config) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _special_ids(config: PreTrainedConfig) -> set[int]:
    named = [item for c in _configs(config) for item in vars(c).items()]
    return {v for k, v in named if isinstance(v, int) and re.search(r"_id$|_index$|_token", k)}


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    sized = [c for c in _configs(config) if hasattr(c, "patch_size") or hasattr(c, "image_size")]
    return next((c for c in sized if c is not config), sized[0] if sized else config)


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and all below it, outermost first."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    below = [c for part in parts if isinstance(part, PreTrainedConfig) for c in _configs(part)]
    return [config, *below]
