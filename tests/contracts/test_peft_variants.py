"""Every kind of PEFT adapter on sparse layers: trained, saved, reloaded, merged both ways."""

import copy
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import logits
from hf_sparse import AdapterError, SparseConfig, SparseLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Failed to load the CUDA extension",  # BOFT's, as is the next
    "ignore:Setting boft_n_butterfly_factor",
    "ignore:Unmerge result can be inaccurate",  # (IA)3's
    "ignore:Sparse invariant checks",
)

AT = {"target_modules": ["q_proj", "down_proj"]}
VARIANTS = {
    "LoRA": lambda: LoraConfig(r=4, **AT),
    "rsLoRA": lambda: LoraConfig(r=4, use_rslora=True, **AT),
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, **AT),
    "biases": lambda: LoraConfig(r=4, bias="all", **AT),
    "orthogonal start": lambda: LoraConfig(r=4, init_lora_weights="orthogonal", **AT),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, **AT),
    "(IA)3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **AT),
    "VeRA": lambda: peft.VeraConfig(r=4, **AT),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=4, **AT),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=4, **AT),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, **AT),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **AT),
    "HRA": lambda: peft.HRAConfig(r=4, **AT),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=10, **AT),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, **AT),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=10, **AT),
    "MiSS": lambda: peft.MissConfig(r=4, **AT),
    "C3A": lambda: peft.C3AConfig(block_size=4, **AT),
    "RoAd": lambda: peft.RoadConfig(group_size=4, **AT),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, **AT),
    "HiRA": lambda: peft.HiraConfig(r=4, **AT),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **AT),
}
# PEFT changes the base's weights to start these: the sparse layers are dense from then on.
CHANGE_THE_BASE = {
    "PiSSA": lambda: LoraConfig(r=4, init_lora_weights="pissa", **AT),
    "OLoRA": lambda: LoraConfig(r=4, init_lora_weights="olora", **AT),
}
WITHOUT_WEIGHTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
}
FORMS = {
    "unstructured": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "4 bits": {"sparsity": 0.5, "bits": 4, "group_size": 8},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def tiny():
    """One block: adapters know nothing of each other."""
    return tiny_llama(num_hidden_layers=1)


def pruned(model, form="unstructured"):
    hf_sparse.prune(model, SparseConfig(method="magnitude", **FORMS[form]))
    return model


def sparse_layers(model):
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear)
    }


def patterns(model):
    return {name: layer.sparse_weight != 0 for name, layer in sparse_layers(model).items()}


def adapt(base, config):
    torch.manual_seed(0)
    return get_peft_model(base, config).eval()


def train(model, ids, steps=3):
    """A few steps on all of the data; returns the losses before and after."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("variant", [*VARIANTS, *WITHOUT_WEIGHTS])
def test_it_trains_and_reloads_on_the_reloaded_sparse_base(tiny, token_ids, tmp_path, variant):
    pruned(tiny).save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    model = adapt(tiny, (VARIANTS | WITHOUT_WEIGHTS)[variant]())
    first, last = train(model, token_ids)
    assert last < first
    packed = model.get_base_model().state_dict()
    packed = {name.replace(".base_layer", ""): tensor for name, tensor in packed.items()}
    assert all(torch.equal(packed[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@pytest.mark.parametrize(
    ("variant", "form"),
    [*((name, "unstructured") for name in VARIANTS)]
    + [(name, form) for name in ("LoRA", "DoRA", "(IA)3", "OFT") for form in ("2:4", "4 bits")],
)
def test_merged_under_the_mask_it_is_what_peft_makes_of_the_dense_model(
    tiny, token_ids, variant, form
):
    model = adapt(pruned(tiny, form), VARIANTS[variant]())
    before = patterns(model)
    dense = get_peft_model(copy.deepcopy(tiny_dense(model)), VARIANTS[variant]())
    train(model, token_ids)
    peft.set_peft_model_state_dict(dense, get_peft_model_state_dict(model))
    own = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if name.endswith("bias") or "vera_" in name:
            parameter.data.copy_(own[name].data)
    expected = logits(model, token_ids)
    torch.testing.assert_close(logits(dense.eval(), token_ids), expected, rtol=1e-4, atol=1e-5)
    reference = dense.merge_and_unload()
    merged = hf_sparse.merge_adapter(model, dataset=list(token_ids), num_samples=12)
    after = patterns(merged)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    for name in (n for n in before if n.endswith(("q_proj", "down_proj"))):
        wanted = reference.get_submodule(name).weight * before[name]
        found = merged.get_submodule(name)
        assert isinstance(found, SparseLinear)
        if form != "4 bits":
            torch.testing.assert_close(found.weight, wanted)
        else:
            assert found.format.label == "4-bit bitmask"
            # Half a step of a group, or a whole one where a kept weight must not become 0.
            steps = found.format.quantized(found.packed, found.shape).scales.scale
            room = 1.01 * steps.repeat_interleave(8, dim=1)[:, : wanted.shape[1]]
            clipped = room + 0.41 * wanted.abs()
            assert bool(((found.weight - wanted).abs() <= clipped).all())
    found = logits(merged, token_ids)
    error = float((found - expected).norm() / expected.norm())
    assert merged.merge_report.fidelity.output_error == pytest.approx(error, rel=1e-3, abs=1e-7)


def tiny_dense(model):
    """The sparse base of an adapted model as a dense one, without its adapter."""
    base = copy.deepcopy(model).unload()
    return base.dequantize()


@every_variant
def test_peft_merges_it_to_a_right_model_that_is_not_sparse(tiny, token_ids, variant, tmp_path):
    model = adapt(pruned(tiny), VARIANTS[variant]())
    before = {name: layer.matrix for name, layer in sparse_layers(model).items()}
    train(model, token_ids)
    expected = logits(model, token_ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.merge_adapter()
    if variant not in ("(IA)3", "HiRA"):  # they multiply weights: zeros stay
        assert any("call hf_sparse.merge_adapter(model)" in str(w.message) for w in caught)
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    for name, layer in sparse_layers(model).items():
        torch.testing.assert_close(layer.matrix, before[name], rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, token_ids), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, token_ids), logits(merged, token_ids))
    dense = again.dequantize()
    assert not sparse_layers(dense)
    torch.testing.assert_close(logits(dense, token_ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", CHANGE_THE_BASE)
def test_a_start_that_changes_the_base_says_so_and_changes_no_output(tiny, token_ids, variant):
    expected = logits(pruned(tiny), token_ids)
    with pytest.warns(UserWarning, match="the layer is dense now"):
        model = adapt(tiny, CHANGE_THE_BASE[variant]())
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    first, last = train(model, token_ids)
    assert last < first


@pytest.mark.parametrize("variant", WITHOUT_WEIGHTS)
def test_tokens_have_no_weights_to_merge(tiny, token_ids, variant):
    model = adapt(pruned(tiny), WITHOUT_WEIGHTS[variant]())
    with pytest.raises(AdapterError, match="adds tokens, not weights"):
        hf_sparse.merge_adapter(model)
