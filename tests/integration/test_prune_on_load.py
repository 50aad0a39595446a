"""The main job through transformers: prune while loading, save, reload, use."""

import json
import math

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_t5
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    pipeline,
)

import hf_sparse
from conftest import logits
from hf_sparse import SparseConfig, SparseLinear


@pytest.fixture
def dense_folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load_pruned(folder, token_ids, cls=AutoModelForCausalLM, load=None, **arguments):
    arguments.setdefault("dataset", list(token_ids))
    return cls.from_pretrained(
        folder, quantization_config=SparseConfig(**arguments), **(load or {})
    )


def sparse_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:5"])
def test_loading_with_a_config_prunes_every_block_layer_to_the_exact_count(
    dense_folder, token_ids, method, pattern
):
    model = load_pruned(dense_folder, token_ids, method=method, pattern=pattern)
    assert len(sparse_names(model)) == 14
    assert type(model.lm_head) is torch.nn.Linear
    for layer in model.hf_quantizer.report.layers:
        rows, columns = layer.shape
        if pattern == "unstructured":
            expected = rows * columns // 2
        else:
            n, m = map(int, pattern.split(":"))
            tail = columns % m
            expected = rows * (columns // m * (m - n) + tail - math.ceil(n * tail / m))
        weight = model.get_submodule(layer.name).weight
        assert int((weight == 0).sum()) == expected == layer.zeros


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_reloaded_checkpoint_gives_the_same_bits(
    dense_folder, token_ids, tmp_path, pattern, dtype
):
    load = {"dtype": dtype}
    model = load_pruned(dense_folder, token_ids, load=load, pattern=pattern, method="wanda")
    model.save_pretrained(tmp_path / "sparse")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.dtype == model.dtype == getattr(torch, dtype)
    assert sparse_names(again) == sparse_names(model)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.config.quantization_config == model.config.quantization_config


def test_sharded_saves_reload(dense_folder, token_ids, tmp_path):
    model = load_pruned(dense_folder, token_ids)
    model.save_pretrained(tmp_path / "sparse", max_shard_size="8KB")
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_bf16_values_stay_bf16_when_loaded_in_fp32(dense_folder, token_ids, tmp_path):
    model = load_pruned(dense_folder, token_ids, load={"dtype": torch.bfloat16})
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    layer = again.model.layers[0].mlp.up_proj
    assert layer.packed["weight"].dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, model.model.layers[0].mlp.up_proj.weight.float())
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float16)
    assert half.model.layers[0].mlp.up_proj.packed["weight"].dtype == torch.float16


def test_a_base_model_loads_from_a_head_model_checkpoint(dense_folder, token_ids, tmp_path):
    model = load_pruned(dense_folder, token_ids)
    model.save_pretrained(tmp_path / "sparse")
    base = AutoModel.from_pretrained(tmp_path / "sparse")
    assert len(sparse_names(base)) == 14
    with torch.no_grad():
        ours, theirs = base(token_ids)[0], model.model(token_ids)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_loads_and_reloads(dense_folder, token_ids, tmp_path, device_map):
    plain = load_pruned(dense_folder, token_ids)
    mapped = load_pruned(dense_folder, token_ids, load={"device_map": device_map})
    assert torch.equal(logits(mapped, token_ids), logits(plain, token_ids))
    mapped.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", device_map=device_map)
    assert torch.equal(logits(again, token_ids), logits(plain, token_ids))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_modules_are_pruned_saved_and_reloaded(dense_folder, token_ids, tmp_path):
    plain = load_pruned(dense_folder, token_ids)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    load = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    offloaded = load_pruned(dense_folder, token_ids, load=load)
    # Offloaded layers multiply by other kernels.
    torch.testing.assert_close(logits(offloaded, token_ids), logits(plain, token_ids))
    offloaded.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), logits(plain, token_ids))
    load["offload_folder"] = str(tmp_path / "offload2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **load)
    torch.testing.assert_close(logits(again, token_ids), logits(plain, token_ids))


def test_tied_heads_stay_dense_and_tied(tiny, token_ids, tmp_path):
    tiny.config.tie_word_embeddings = True
    LlamaForCausalLM(tiny.config).save_pretrained(tmp_path / "dense")
    model = load_pruned(tmp_path / "dense", token_ids)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" in model.hf_quantizer.report.left_dense
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_weights_that_are_tied_by_name_alone_are_pruned_and_reloaded(
    dense_folder, token_ids, tmp_path
):
    # The config says tied, the checkpoint holds two weights: transformers leaves them two.
    written = json.loads((dense_folder / "config.json").read_text())
    (dense_folder / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))
    model = load_pruned(dense_folder, token_ids, modules_to_not_convert=[])
    assert isinstance(model.lm_head, SparseLinear)
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert isinstance(again.lm_head, SparseLinear)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_conv1d_layers_are_pruned_reloaded_and_restored(token_ids, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "dense")
    model = load_pruned(tmp_path / "dense", token_ids, sparsity=0.6)
    assert len(sparse_names(model)) == 8
    assert model.transformer.h[0].mlp.c_fc.shape == (96, 24)
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    hf_sparse.export_dense(again, tmp_path / "export")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert export.transformer.h[0].mlp.c_fc.weight.shape == (24, 96)
    torch.testing.assert_close(logits(export, token_ids), logits(model, token_ids))


def test_an_encoder_with_a_task_head_keeps_the_head_dense(token_ids, tmp_path):
    tiny_bert(BertForSequenceClassification).save_pretrained(tmp_path / "dense")
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * 16} for row in token_ids]
    model = load_pruned(
        tmp_path / "dense", token_ids, cls=BertForSequenceClassification, dataset=data
    )
    assert type(model.classifier) is torch.nn.Linear
    assert len(sparse_names(model)) == 13  # six in each block, and the pooler
    model.save_pretrained(tmp_path / "sparse")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_an_encoder_decoder_is_walked_through_both_stacks(token_ids, tmp_path):
    tiny_t5().save_pretrained(tmp_path / "dense")
    data = [{"input_ids": i[None], "decoder_input_ids": i[None, :8]} for i in token_ids]
    model = load_pruned(tmp_path / "dense", token_ids, cls=T5ForConditionalGeneration, dataset=data)
    # Six layers in each encoder block, ten in each decoder block; T5 keeps every wo in fp32.
    assert len(sparse_names(model)) == 2 * 5 + 2 * 9
    assert model.hf_quantizer.report.sparsity == 0.5
    decoder = [x for x in model.hf_quantizer.report.layers if x.name.startswith("decoder")]
    assert {layer.tokens for layer in decoder} == {12 * 8, 12 * 16}  # cross-attention reads both


def test_padding_does_not_count_in_the_statistics(tiny, token_ids):
    lengths = [5, 16, 9, 12]
    samples = [ids[:n] for ids, n in zip(token_ids, lengths, strict=False)]
    models = [tiny_bert(BertModel) for _ in range(2)]
    reports = [
        hf_sparse.prune(m, SparseConfig(dataset=samples, batch_size=b, targets=["encoder"]))
        for m, b in zip(models, (1, 4), strict=True)
    ]
    assert {layer.tokens for report in reports for layer in report.layers} == {sum(lengths)}
    for name in sparse_names(models[0]):
        ours, theirs = (m.get_submodule(name).weight for m in models)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_another_config_on_a_sparse_checkpoint_is_ignored_with_a_warning(
    dense_folder, token_ids, tmp_path
):
    load_pruned(dense_folder, token_ids, sparsity=0.7).save_pretrained(tmp_path / "sparse")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load_pruned(tmp_path / "sparse", token_ids, sparsity=0.2)
    assert again.config.quantization_config.sparsity == 0.7
    assert again.hf_quantizer.report.config["sparsity"] == 0.7


def test_keep_packs_what_another_tool_left_in_a_dense_file(tiny, token_ids, tmp_path):
    for name, module in tiny.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            if "mlp" in name:  # 2:4, as others leave it
                weight.view(weight.shape[0], -1, 4)[:, :, :2] = 0
            else:
                weight.flatten()[torch.randperm(weight.numel())[: int(0.6 * weight.numel())]] = 0
    tiny.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=SparseConfig(method="keep")
    )
    formats = {
        layer.name.split(".")[-2]: layer.format for layer in model.hf_quantizer.report.layers
    }
    assert formats == {"self_attn": "bitmask", "mlp": "n:m"}
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name in sparse_names(again):
        assert torch.equal(again.get_submodule(name).weight, tiny.get_submodule(name).weight)
    torch.testing.assert_close(logits(again, token_ids), logits(tiny, token_ids))


def test_sparsities_by_regex_and_targets_select_layers(dense_folder, token_ids):
    sparsity = {"layers.0": 0.0, "q_proj|k_proj": 0.75, "mlp": 0.25}
    model = load_pruned(dense_folder, token_ids, sparsity=sparsity, format="bitmask")
    report = model.hf_quantizer.report
    found = {layer.name.removeprefix("model.layers."): layer.sparsity for layer in report.layers}
    assert found == {
        "1.self_attn.q_proj": 0.75,
        "1.self_attn.k_proj": 0.75,
        "1.mlp.gate_proj": 0.25,
        "1.mlp.up_proj": 0.25,
        "1.mlp.down_proj": 0.25,
    }
    assert report.left_dense["model.layers.1.self_attn.o_proj"] == "no regex of sparsity matches it"
    assert report.left_dense["model.layers.0.mlp.up_proj"] == "its sparsity is 0"
    model = load_pruned(dense_folder, token_ids, targets=["o_proj", "lm_head"])
    assert [name.rsplit(".", 1)[-1] for name in sparse_names(model)] == [
        "o_proj",
        "o_proj",
        "lm_head",
    ]


@pytest.mark.parametrize("sparsity", [0.0, 0.05])
def test_auto_stays_dense_rather_than_growing(dense_folder, token_ids, tmp_path, sparsity):
    load = {"dtype": torch.bfloat16}
    model = load_pruned(dense_folder, token_ids, load=load, sparsity=sparsity)
    assert sparse_names(model) == []
    report = model.hf_quantizer.report
    assert report.bytes_after == report.bytes_before
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@pytest.mark.parametrize(("pattern", "limit"), [("unstructured", 0.57), ("2:4", 0.57)])
def test_half_the_weights_take_little_more_than_half_the_bytes(
    model_path, tmp_path, pattern, limit
):
    config = SparseConfig(pattern=pattern, method="magnitude")
    model = AutoModelForCausalLM.from_pretrained(model_path, quantization_config=config)
    report = model.hf_quantizer.report
    in_memory = sum(
        tensor.numel() * tensor.element_size()
        for name in sparse_names(model)
        for tensor in model.get_submodule(name).buffers()
    )
    assert in_memory == report.bytes_resident <= limit * report.bytes_before
    assert report.bytes_after <= limit * report.bytes_before
    model.save_pretrained(tmp_path)
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert on_disk - rest <= limit * report.bytes_before


def test_the_same_seed_and_data_give_the_same_bytes(dense_folder, tokenizer, data_path, tmp_path):
    for run in ("a", "b"):
        model = AutoModelForCausalLM.from_pretrained(
            dense_folder,
            quantization_config=SparseConfig(dataset=torch.arange(3, 61)[None, :32].repeat(3, 1)),
        )
        model.save_pretrained(tmp_path / run)
    first, second = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("a", "b"))
    assert first == second


def test_methods_rank_as_in_their_papers_on_a_trained_model(
    trained, model_path, tokenizer, data_path
):
    pages = (data_path / "evaluation.txt").read_text().split("\n\n\0\n")
    ids = torch.tensor(tokenizer("".join(pages))["input_ids"][: 12 * 128]).view(12, 128)

    def loss(model):
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    losses = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        config = SparseConfig(
            sparsity=0.6,
            method=method,
            dataset=str(data_path / "calibration.txt"),
            num_samples=16,
            seq_len=128,
            batch_size=4,
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, quantization_config=config
        )
        record = model.config.quantization_config.dataset
        assert (record.source, record.count, record.tokens) == ("calibration.txt", 16, 16 * 128)
        losses[method] = loss(model.dequantize())
    assert loss(trained) < losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


def test_generation_works_on_sparse_layers(model_path, tokenizer):
    config = SparseConfig(method="magnitude", sparsity=0.3, format="bitmask")
    model = AutoModelForCausalLM.from_pretrained(model_path, quantization_config=config)
    ids = tokenizer("The function returns", return_tensors="pt")
    ours = model.generate(**ids, max_new_tokens=8, do_sample=False)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generator("The function returns", max_new_tokens=8, do_sample=False)
    assert text[0]["generated_text"] == tokenizer.decode(ours[0], skip_special_tokens=True)
    dense = model.dequantize()
    assert torch.equal(dense.generate(**ids, max_new_tokens=8, do_sample=False), ours)
