"""`bench model` on a model of one's own, with a llama-bench that was made up."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse_cli.bench import alternatives, alternatives_table, llama_file

PROGRAM = """#!{python}
import json, sys
sys.path[:] = {path}
from gguf import GGUFReader
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
reader = GGUFReader(options["-m"])
shapes = {{t.name: [int(n) for n in t.shape] for t in reader.tensors}}
assert shapes["blk.1.attn_k.weight"] == [64, 32], shapes
kinds = {{t.tensor_type.name for t in reader.tensors}}
open({log!r}, "a").write(",".join(sorted(kinds)) + "\\n")
print(json.dumps([{{"n_gen": int(options["-n"]), "avg_ts": 12.5}}]))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A dense and a sparse folder of one small Llama."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "dense")
    hf_sparse.prune(model, SparseConfig(method="magnitude"))
    model.save_pretrained(folder / "sparse")
    return folder


def settings(folder, program=None):
    sparse, dense = str(folder / "sparse"), str(folder / "dense")
    return alternatives.Settings(sparse, dense, None, 8, 2, 4, 2, 1, program)


def test_every_form_has_a_row_and_what_is_not_there_says_why(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(alternatives.OTHERS, "nothing", ("no_such_package", None))

    def broken(dense):
        raise RuntimeError("not on this CPU")

    monkeypatch.setitem(alternatives.OTHERS, "torchao int8", ("torch", broken))
    log, program = tmp_path / "log", tmp_path / "llama-bench"
    program.write_text(PROGRAM.format(python=sys.executable, path=sys.path, log=str(log)))
    program.chmod(0o755)
    rows = {row.name: row for row in alternatives.measure(settings(checkpoints, program))}
    assert rows["nothing"].problem == "no_such_package is not installed"
    assert rows["torchao int8"].problem == "RuntimeError: not on this CPU"
    assert rows["dense fp32"].nbytes > rows["dense bf16"].nbytes > rows["hf_sparse"].nbytes
    assert rows["llama.cpp Q8_0"].tokens_per_second == 12.5
    assert rows["llama.cpp F16"].nbytes > rows["llama.cpp Q8_0"].nbytes
    assert rows["llama.cpp Q8_0"].nbytes > rows["llama.cpp Q4_0"].nbytes > 0
    assert log.read_text().split() == ["F16,F32", "F32,Q8_0", "F32,Q4_0"]
    text, content = alternatives_table.write(tmp_path / "out", list(rows.values()))
    assert "| dense bf16 | " in text
    assert "no_such_package" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == content
    assert (tmp_path / "out" / "alternatives.png").stat().st_size > 1000


def test_a_package_whose_model_fails_at_the_first_token_leaves_the_others_measured(
    checkpoints, monkeypatch
):
    def breaks(dense):
        model = AutoModelForCausalLM.from_pretrained(dense)
        model.register_forward_pre_hook(lambda *_: 1 / 0)
        return model

    monkeypatch.setattr(alternatives, "OTHERS", {"torchao int8": ("torch", breaks)})
    rows = {row.name: row for row in alternatives.measure(settings(checkpoints))}
    assert rows["torchao int8"].problem == "ZeroDivisionError: division by zero"
    assert rows["hf_sparse"].tokens_per_second > 0


def test_the_command_takes_the_number_of_threads_and_leaves_torchs(cli, checkpoints, monkeypatch):
    monkeypatch.setattr(alternatives, "OTHERS", {})
    own = "--sparse", checkpoints / "sparse", "--dense", checkpoints / "dense"
    short = "--prompt", "2", "--tokens", "1", "--rounds", "1"
    before = torch.get_num_threads()
    code, out, err = cli("bench", "model", *own, *short, "--threads", "3")
    assert code == 0, err
    assert "; 3 threads of torch's pool." in out
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--presets", "tiny"), "is for models with random weights"),
        (("--sparsity", "0.5"), "is for models with random weights"),
        (("--dtypes", "bf16"), "is for models with random weights"),
        (("--threads", "1,2"), "takes one number"),
    ],
)
def test_what_would_be_ignored_for_ones_own_model_is_refused(cli, checkpoints, option, said):
    own = "--sparse", checkpoints / "sparse", "--dense", checkpoints / "dense"
    code, _, err = cli("bench", "model", *own, *option)
    assert code == 2
    assert option[0] in err
    assert said in " ".join(err.split())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "ends with code 3"),
        ("echo hello", "is it llama-bench"),
        ("echo '[]'", "is it llama-bench"),
    ],
)
def test_a_program_that_is_not_llama_bench_is_told(tmp_path, script, said):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(llama_file.LlamaError, match=said):
        llama_file.decode_speed(program, tmp_path / "x.gguf", 2, 1)
    with pytest.raises(llama_file.LlamaError, match="doesn't run"):
        llama_file.decode_speed(tmp_path / "nothing", tmp_path / "x.gguf", 2, 1)
