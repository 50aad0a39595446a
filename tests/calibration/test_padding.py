"""Padding: a mask drops the rows that are its tokens, and no others that are as many."""

import pytest
import torch
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    ViltConfig,
    ViltModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_sparse.calibration.batches import make_batches
from hf_sparse.calibration.block_walk import BlockWalk
from hf_sparse.calibration.layer_statistics import collect_statistics
from hf_sparse.calibration.token_masks import token_mask
from hf_sparse.core.statistics import Needs
from hf_sparse.layers.blocks import find_blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, other=None):
        y = x + self.own(x)
        return y if other is None else y + self.cross(other).mean(dim=1, keepdim=True)


class Translator(nn.Module):
    """An encoder, a decoder that also sees the encoder's outputs, and image patches."""

    def __init__(self, positions: int = 99) -> None:
        super().__init__()
        self.positions = positions
        self.embed = nn.Embedding(9, 4)
        self.encoder, self.decoder = nn.ModuleList([Block()]), nn.ModuleList([Block()])
        self.vision = nn.ModuleList([nn.Sequential(nn.Conv1d(3, 4, 1))])

    def forward(
        self,
        input_ids,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        pixel_values=None,
    ):
        if input_ids.shape[1] != self.positions and self.positions != 99:
            raise ValueError("another length")
        encoded = self.encoder[0](self.embed(input_ids))
        if pixel_values is not None:
            encoded = encoded + self.vision[0](pixel_values).mean(dim=2)[:, None]
        return self.decoder[0](self.embed(decoder_input_ids), encoded)


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
DECODER = torch.tensor([[8, 7, 6, 5], [4, 3, 2, 1]])
NAMES = [
    "encoder.0.own",
    "decoder.0.own",
    "decoder.0.cross",
    "vision.0.0",
]


def tokens(model, batches, names=NAMES) -> dict[str, int]:
    """How many tokens each layer's statistics are of."""
    found = {}
    with torch.no_grad():
        for visit in BlockWalk(model, find_blocks(model, names), batches):
            layers = {name: model.get_submodule(name) for name in visit.block.targets}
            seen = collect_statistics(visit, layers, Needs.HESSIAN)
            found |= {name: observed.statistics.tokens for name, observed in seen.items()}
    return found


def test_a_decoder_with_as_many_tokens_as_the_encoder_keeps_all_of_its_own():
    batch = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODER}
    found = tokens(Translator(), [batch])
    assert found == {"encoder.0.own": 6, "decoder.0.own": 8, "decoder.0.cross": 6}


def test_each_mask_drops_the_rows_of_its_own_tokens():
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "decoder_input_ids": DECODER,
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "pixel_values": torch.randn(2, 3, 4),
    }
    expected = {"encoder.0.own": 6, "decoder.0.own": 7, "decoder.0.cross": 6, "vision.0.0": 8}
    assert tokens(Translator(), [batch]) == expected
    # Found once, and used for batches of other lengths.
    longer = {k: torch.cat([v, v], dim=1) for k, v in batch.items() if k != "pixel_values"}
    longer["pixel_values"] = torch.randn(2, 3, 8)
    assert tokens(Translator(), [batch, longer]) == {k: 3 * v for k, v in expected.items()}


def test_a_model_that_takes_one_length_alone_goes_by_the_number_of_rows():
    model = Translator(positions=4)
    batch = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODER[:, :3]}
    assert tokens(model, [batch]) == {"encoder.0.own": 6, "decoder.0.own": 6, "decoder.0.cross": 6}


@pytest.mark.parametrize("mask", [torch.ones_like(MASK), torch.ones(2, 1, 4, 4)])
def test_without_padding_no_further_pass_is_made(mask):
    model = Translator()
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    tokens(model, [{"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": DECODER}])
    assert len(passes) == 2  # one to look at the blocks, one to stop in front of them


@pytest.mark.parametrize(
    "mask", [MASK.repeat(1, 3), torch.ones(2, 1, 3, 4).tril()], ids=["longer", "queries"]
)
def test_a_mask_that_no_layer_s_rows_are_of_is_told_once(mask, caplog):
    batch = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": DECODER}
    assert tokens(Translator(), [batch, batch])["encoder.0.own"] == 16
    (message,) = caplog.messages
    assert message.startswith("attention_mask of the calibration data may mark padding")


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
FORMS = {
    "of keys": (MASK, MASK.bool()[:, None, None]),
    "causal": (MASK, CAUSAL & MASK.bool()[:, None, None]),
    "causal without heads": (MASK, CAUSAL & MASK.bool()[:, None]),
    "in both directions": (MASK, MASK.bool()[:, None, None].expand(2, 1, 4, 4)),
    "with rows for padding": (LEFT, (CAUSAL & LEFT[:, None, None]) | torch.eye(4).bool()),
    "with full rows for padding": (LEFT, CAUSAL & LEFT[:, None, None] | ~LEFT[:, None, :, None]),
    "packed": (torch.ones(2, 4), torch.block_diag(*[CAUSAL[:2, :2]] * 2).expand(2, 1, 4, 4)),
    "one token": (torch.ones(2, 1), torch.ones(2, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["boolean", "ones", "added", "added -10000"])
def test_the_tokens_of_a_mask_are_told_in_every_form(form, kind):
    expected, mask = FORMS[form]
    if kind == "ones":
        mask = mask.float()
    elif kind.startswith("added"):
        lowest = -10000.0 if "-" in kind else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask.bool(), lowest)
    assert torch.equal(token_mask(mask), expected.bool())


def test_a_mask_of_pairs_drops_the_rows_of_padding_and_counts_the_tokens(caplog):
    mask = CAUSAL & MASK.bool()[:, None, None]
    batch = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": DECODER}
    found = tokens(Translator(), [batch])
    assert found == {"encoder.0.own": 6, "decoder.0.own": 8, "decoder.0.cross": 6}
    assert not caplog.messages
    data = make_batches([batch], lambda: None, num_samples=1, seq_len=4, batch_size=1, seed=0,
                        vocab_size=9)  # fmt: skip
    assert data.record.tokens == 6


def test_patches_behind_text_are_told_by_the_mask_that_the_blocks_are_handed(caplog):
    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=32, patch_size=8, vocab_size=9,
    )  # fmt: skip
    model, pixels = ViltModel(config).eval(), torch.zeros(2, 32, 32, dtype=torch.long)
    pixels[0], pixels[1, :16, :24] = 1, 1
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_mask": pixels,
    }
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    found = tokens(model, [batch], names)
    pooled = found.pop("pooler.dense")
    # Text, the class token, and patches of 8 x 8: 4 x 4 of them, and 2 x 3.
    assert (set(found.values()), pooled) == ({4 + 1 + 16 + 2 + 1 + 6}, 2)
    assert not caplog.messages


def test_layers_whose_padding_can_not_be_told_are_named(caplog):
    class Folded(Translator):
        def forward(self, input_ids, attention_mask):
            x = self.encoder[0](self.embed(input_ids))
            return self.decoder[0](torch.cat([x, x]))

    batch = {"input_ids": IDS, "attention_mask": MASK}
    found = tokens(Folded(), [batch], ["encoder.0.own", "decoder.0.own"])
    assert found == {"encoder.0.own": 6, "decoder.0.own": 16}
    (message,) = caplog.messages
    assert "which rows of 1 layers are padding" in message
    assert "decoder.0.own" in message


def speech(cls, config) -> nn.Module:
    """A model whose convolutions make a frame of ten samples of sound."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": [8, 8],
        "conv_kernel": [10, 3],
        "conv_stride": [5, 2],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "vocab_size": 20,
    }
    return cls(config(**sizes)).eval()


@pytest.mark.parametrize(
    ("cls", "config"), [(Wav2Vec2ForCTC, Wav2Vec2Config), (HubertForCTC, HubertConfig)]
)
def test_frames_of_padded_sound_are_counted_as_the_convolutions_make_them(cls, config, caplog):
    model, samples = speech(cls, config), torch.tensor([[400], [90], [140]])
    mask = (torch.arange(400) < samples).long()
    sound = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) * mask
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    found = tokens(model, [{"input_values": sound, "attention_mask": mask}], names)
    frames = ((samples - 10) // 5 + 1 - 3) // 2 + 1  # of the two convolutions
    assert set(found.values()) == {int(frames.sum())}
    assert len(found) > 6
    assert "may mark padding" not in caplog.text
    assert not any("_get_feature_vector_attention_mask" in vars(m) for m in model.modules())


def test_a_front_that_shortens_the_sound_has_its_own_frames():
    config = Speech2TextConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, conv_channels=8,
        input_feat_per_channel=6, max_source_positions=100, max_target_positions=20,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    model = Speech2TextForConditionalGeneration(config).eval()
    mask = (torch.arange(64) < torch.tensor([[64], [20]])).long()
    batch = {
        "input_features": torch.randn(2, 64, 6) * mask[..., None],
        "attention_mask": mask,
        "decoder_input_ids": torch.tensor([[2, 3, 4], [2, 5, 6]]),
    }
    encoder, decoder = "model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"
    found = tokens(model, [batch], [encoder, decoder])
    assert found == {encoder: 16 + 5, decoder: 6}  # two convolutions of stride 2
