"""Perplexity, agreement and speed against independent loops in float64."""

import copy
import json
import math
import mmap
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BertConfig, BertForMaskedLM

import hf_sparse
from hf_sparse import CalibrationError, EvaluationError
from hf_sparse.evaluation import memory


def log_probability(model, context, token) -> float:
    """log p(token | context), one forward pass for one token, normalised in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    peak = max(logits.tolist())
    return float(logits[token]) - peak - math.log(sum(math.exp(x - peak) for x in logits.tolist()))


def test_blocks_give_the_perplexity_of_a_float64_loop(tiny, token_ids):
    data = [row[: 9 + i] for i, row in enumerate(token_ids[:5])]  # 9 to 13 tokens: padded batches
    expected = [
        log_probability(tiny, row[:t].tolist(), row[t]) for row in data for t in range(1, len(row))
    ]
    found = hf_sparse.perplexity(tiny, None, data, 12, batch_size=2)
    expected = expected[:-1]  # the last one has 13 tokens, of which 12 are used
    assert found.tokens == len(expected)
    assert found.windows == 5
    assert found.nll == pytest.approx(-sum(expected) / len(expected), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)
    assert found.stride is None


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_sliding_windows_score_each_token_once_with_the_window_s_context(tiny, token_ids, stride):
    stream, seq_len = token_ids[:4].flatten().tolist()[:50], 12
    expected, scored, windows = [], 1, 0
    for start in range(0, len(stream), stride):
        end = min(start + seq_len, len(stream))
        windows += 1
        for t in range(scored, end):
            expected.append(log_probability(tiny, stream[start:t], stream[t]))
        scored = end
        if end == len(stream):
            break
    rows = [stream[i : i + seq_len] for i in range(0, 50, seq_len)]
    found = hf_sparse.perplexity(tiny, None, rows, seq_len, stride=stride)
    assert len(expected) == 49
    assert found.tokens == 49
    assert found.windows == windows
    assert found.nll == pytest.approx(-sum(expected) / 49, abs=1e-5)


def test_text_is_packed_in_the_order_of_an_iterator(trained, tokenizer, data_path):
    pages = (data_path / "evaluation.txt").read_text().split("\n\n\0\n")[:4]
    ids = [i for page in pages for i in [0, *tokenizer(page, add_special_tokens=False).input_ids]]
    blocks = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[:6]
    with torch.no_grad():
        logits = trained(blocks).logits.double().log_softmax(-1)
    nll = -logits[:, :-1].gather(-1, blocks[:, 1:, None]).mean()
    found = hf_sparse.perplexity(trained, tokenizer, iter(pages), 64, num_samples=6, batch_size=4)
    assert found.tokens == 6 * 63
    assert found.nll == pytest.approx(float(nll), abs=1e-5)


def test_padding_in_dicts_of_inputs_does_not_count(tiny, token_ids):
    row = token_ids[0].tolist()
    left = {"input_ids": [[0, 0, *row]], "attention_mask": [[0, 0, *([1] * 16)]]}
    padded = hf_sparse.perplexity(tiny, None, [left])
    assert padded.tokens == 15


def test_agreement_is_the_mean_divergence_of_a_float64_loop(tiny, token_ids):
    tiny.lm_head.weight.data *= 20  # peaked: a divergence far above what rounding makes of none
    sparse = copy.deepcopy(tiny)
    hf_sparse.prune(sparse, hf_sparse.SparseConfig(method="magnitude", sparsity=0.7))
    data = [row[: 5 + i] for i, row in enumerate(token_ids[:4])]
    divergences, same = [], []
    for row in data:
        with torch.no_grad():
            p = tiny(row[None]).logits[0].double().softmax(-1)
            q = sparse(row[None]).logits[0].double().softmax(-1)
        for position in range(len(row)):
            pairs = zip(p[position].tolist(), q[position].tolist(), strict=True)
            divergences.append(sum(a * math.log(a / b) for a, b in pairs))
            same.append(int(p[position].argmax() == q[position].argmax()))
    found = hf_sparse.agreement(sparse, tiny, None, data, batch_size=4)
    assert found.tokens == len(divergences) == 5 + 6 + 7 + 8
    expected = sum(divergences) / len(divergences)
    assert expected > 1e-2
    assert found.kl_divergence == pytest.approx(expected, rel=1e-3)
    assert found.top1 == sum(same) / len(same)
    assert 0 < found.kl_divergence < 1


def test_a_model_agrees_with_itself(tiny, token_ids):
    found = hf_sparse.agreement(tiny, tiny, None, list(token_ids))
    assert (found.kl_divergence, found.top1) == (0, 1)


def test_a_token_that_the_dense_model_rules_out_counts_nothing(tiny, token_ids):
    class Never(torch.nn.Module):
        def forward(self, logits):
            return logits.index_fill(-1, torch.tensor([7]), -math.inf)

    tiny.lm_head = torch.nn.Sequential(tiny.lm_head, Never())
    found = hf_sparse.agreement(tiny, tiny, None, list(token_ids))
    assert found.kl_divergence == 0


def test_models_of_different_vocabularies_can_t_be_compared(tiny, token_ids):
    other = copy.deepcopy(tiny)
    other.resize_token_embeddings(70)
    with pytest.raises(EvaluationError, match="vocabularies have 70 and 61"):
        hf_sparse.agreement(tiny, other, None, list(token_ids))


def test_the_mode_of_a_model_is_restored(tiny, token_ids):
    tiny.train()
    hf_sparse.perplexity(tiny, None, list(token_ids))
    assert tiny.training
    with pytest.raises(EvaluationError):
        hf_sparse.perplexity(tiny, None, [[5]])
    assert tiny.training


def test_generation_is_timed_and_weighed(tiny):
    found = hf_sparse.generation_speed(tiny, prompt_tokens=7, new_tokens=3, rounds=2)
    assert (found.prompt_tokens, found.new_tokens) == (7, 3)
    assert found.tokens_per_second == 1 / found.decode_seconds > 0
    assert found.prefill_seconds > 0
    parameters = sum(p.numel() * 4 for p in tiny.parameters())
    assert parameters <= found.weight_bytes < parameters + 1000  # and the rotary frequencies
    assert found.peak_bytes == 0 or found.peak_bytes > found.weight_bytes


@pytest.mark.skipif(not memory.peak_resident(), reason="the system doesn't tell")
def test_a_peak_is_seen_until_it_is_reset():
    cpu = torch.device("cpu")
    memory.reset_peak(cpu)
    before = memory.peak(cpu)
    # Pages of its own: the heap may hold room for a tensor that earlier tests have freed.
    with mmap.mmap(-1, 64 << 20) as large:
        for page in range(0, len(large), mmap.PAGESIZE):
            large[page] = 1
    assert memory.peak(cpu) > before + (50 << 20)
    memory.reset_peak(cpu)
    assert memory.peak(cpu) < before + (50 << 20)


def test_resident_memory_holds_what_was_touched():
    before = memory.resident()
    with mmap.mmap(-1, 64 << 20) as large:
        for page in range(0, len(large), mmap.PAGESIZE):
            large[page] = 1
        assert memory.resident() > before + (50 << 20)


def test_weights_that_are_not_there_weigh_nothing():
    assert memory.weight_bytes(torch.nn.Linear(3, 4, device="meta")) == 0


def test_tied_weights_are_weighed_once(trained):
    embedding = trained.get_input_embeddings().weight
    assert trained.get_output_embeddings().weight is embedding
    assert memory.weight_bytes(trained) < sum(p.numel() * 4 for p in trained.parameters()) + 1000


def test_a_quantised_tensor_weighs_what_it_is_made_of(tiny):
    plain = memory.weight_bytes(tiny)
    head = tiny.get_output_embeddings()
    weight = head.weight.detach()
    head.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    assert memory.weight_bytes(tiny) == plain + weight.nbytes


def test_results_are_frozen_and_json(tiny, token_ids):
    results = [
        hf_sparse.perplexity(tiny, None, list(token_ids)),
        hf_sparse.agreement(tiny, tiny, None, list(token_ids)),
        hf_sparse.generation_speed(tiny, prompt_tokens=2, new_tokens=1, rounds=1),
    ]
    for result in results:
        values = json.loads(json.dumps(result.to_dict()))
        assert len(values) >= 5
        with pytest.raises(FrozenInstanceError):
            setattr(result, next(iter(values)), 0)
        assert len(str(result).splitlines()) == 1
    assert results[0].to_dict()["data"]["count"] == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seq_len": 65}, "seq_len=65 must be .* at most the 64 positions"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"seq_len": 8, "stride": 8}, "stride=8 must be an integer of at least 1 and less than"),
        ({"seq_len": 8, "stride": 0}, "stride=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"seq_len": 8, "stride": 1.5}, "stride=1.5 must be an integer"),
        ({"num_samples": True}, "num_samples=True"),
        ({"batch_size": None}, "batch_size=None must be an integer"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
    ],
)
def test_arguments_out_of_range_are_named(tiny, token_ids, arguments, words):
    with pytest.raises(EvaluationError, match=words):
        hf_sparse.perplexity(tiny, None, list(token_ids), **arguments)


def test_a_model_that_predicts_no_next_token_is_refused():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(vocab_size=20, num_hidden_layers=1, **sizes))
    for measure in (
        lambda: hf_sparse.perplexity(bert, None, [[3, 4]]),
        lambda: hf_sparse.generation_speed(bert),
        lambda: hf_sparse.evaluate_tasks(bert, None, ["any"]),
    ):
        with pytest.raises(EvaluationError, match="BertForMaskedLM is no causal language model"):
            measure()


def test_bad_data_are_calibration_s_errors(tiny):
    with pytest.raises(CalibrationError, match=r"missing\.txt.*no such file"):
        hf_sparse.perplexity(tiny, None, "missing.txt")
    with pytest.raises(EvaluationError, match="have no input_ids"):
        hf_sparse.perplexity(tiny, None, [{"pixel_values": [[1.0]]}])
    with pytest.raises(EvaluationError, match="prompt_tokens=0"):
        hf_sparse.generation_speed(tiny, prompt_tokens=0)


def test_a_hub_id_is_read_from_the_split_that_is_asked_for(tiny, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        return [{"input_ids": [5, 6, 7]}]

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    measured = hf_sparse.perplexity(tiny, None, "wikitext2")
    assert (measured.tokens, measured.data.source) == (2, "wikitext2")
    hf_sparse.perplexity(tiny, None, "me/mine:small", split="validation")
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), "test"),
        (("me/mine", "small"), "validation"),
    ]


def test_a_hub_id_that_the_hub_does_not_give_is_named(tiny):
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match="'nobody/nothing' is neither a file here nor"):
        hf_sparse.perplexity(tiny, None, "nobody/nothing")


def test_without_lm_eval_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of it fails
    with pytest.raises(EvaluationError, match=r"not installed: pip install lm-eval"):
        hf_sparse.evaluate_tasks(tiny, None, ["arc_easy"])


def test_joined_documents_give_the_perplexity_of_the_papers_code(trained, tokenizer):
    rows = ["", " = A title = \n", "", "Some words of it .\n", "And more of them .\n"] * 8
    # The loop of GPTQ, SparseGPT and Wanda.
    stream = tokenizer("\n\n".join(rows), return_tensors="pt")["input_ids"]
    losses = []
    for i in range(stream.shape[1] // 16):
        block = stream[:, i * 16 : (i + 1) * 16]
        with torch.no_grad():
            scores = trained(block).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores[0], block[0, 1:]))
    expected = torch.stack(losses).mean().exp().item()
    found = hf_sparse.perplexity(trained, tokenizer, rows, 16, join_documents=True)
    assert found.windows == len(losses) > 3
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    apart = hf_sparse.perplexity(trained, tokenizer, rows, 16).perplexity
    assert apart != pytest.approx(expected, rel=1e-2)
    same = hf_sparse.agreement(trained, trained, tokenizer, rows, 16, join_documents=True)
    assert same.data.digest == found.data.digest
