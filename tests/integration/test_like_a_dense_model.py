"""What users do with a dense model works on a sparse one, or says what to do instead."""

import copy
import os
import threading
import warnings

import fresh
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparse
from conftest import logits
from hf_sparse import CheckpointError, ConfigError, SparseConfig, TrainingError
from hf_sparse.layers import sparse_layers
from hf_sparse.training import finish_training, prepare_for_training

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def sparse(tiny):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    return tiny.eval()


def lora(**kwargs):
    return LoraConfig(r=4, target_modules=["q_proj"], **kwargs)


def test_parameters_are_counted_as_the_dense_model_s(tiny):
    dense, sparse = copy.deepcopy(tiny), tiny
    hf_sparse.prune(sparse, SparseConfig(method="magnitude"))
    values = sum(
        layer.packed["weight"].numel() for layer in hf_sparse.layers.sparse_layers(sparse).values()
    )
    left = sum(p.numel() for p in sparse.parameters())
    for settings in ({}, {"exclude_embeddings": True}):
        assert sparse.num_parameters(**settings) == dense.num_parameters(**settings)
    prepare_for_training(sparse)
    assert sparse.num_parameters() == dense.num_parameters()
    assert sparse.num_parameters(only_trainable=True) == left + values
    finish_training(sparse)
    counted = [
        get_peft_model(model, lora()).get_nb_trainable_parameters() for model in (sparse, dense)
    ]
    assert counted[0] == counted[1]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    ("module", "found"), [("down_proj", "a sparse layer,"), ("mlp", "it holds .*up_proj")]
)
def test_a_copy_of_a_sparse_layer_that_would_not_train_is_refused(sparse, module, found):
    with pytest.raises(TrainingError, match=f"modules_to_save names .*{found}.*target_modules"):
        get_peft_model(sparse, lora(modules_to_save=[module]))


def test_a_dense_layer_is_trained_in_full_beside_sparse_ones(sparse):
    model = get_peft_model(sparse, lora(modules_to_save=["lm_head"]))
    assert any(p.requires_grad for n, p in model.named_parameters() if "lm_head" in n)


def test_fixed_values_do_not_take_a_gradient_without_a_word(sparse):
    layer = sparse.get_submodule(UP)
    layer.requires_grad_(False)
    with pytest.raises(TrainingError, match="prepare_for_training"):
        layer.requires_grad_()
    prepare_for_training(sparse)
    layer.requires_grad_()
    assert layer.weight_values.requires_grad


def test_a_model_s_own_config_loads_it_again(sparse, tmp_path, token_ids):
    sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=sparse.config)
    assert torch.equal(logits(again, token_ids), logits(sparse, token_ids))


def test_dense_weights_with_the_config_of_a_sparse_model_are_told_apart(sparse, tmp_path):
    AutoModelForCausalLM.from_config(sparse.config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"delete quantization_config in config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_was_emptied_is_filled_from_its_state_dict(sparse):
    block, x = sparse.model.layers[0].mlp, torch.randn(3, 24)
    expected, state = block(x), copy.deepcopy(block.state_dict())
    kernels = [layer.kernel.name for layer in sparse_layers(block).values()]
    block.to_empty(device="cpu")
    block.load_state_dict(state)
    assert [layer.kernel.name for layer in sparse_layers(block).values()] == kernels
    assert torch.equal(block(x), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_layers_on_disk_stay_there_but_for_their_calls(tiny, token_ids, tmp_path, buffers, rank):
    data = {"method": "sparsegpt", "dataset": list(token_ids), "low_rank": rank}
    hf_sparse.prune(tiny, SparseConfig(**data if rank else {"method": "magnitude"}))
    expected = logits(tiny.eval(), token_ids)
    tiny.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places,
        offload_folder=tmp_path / "offloaded",
        offload_buffers=buffers,
    )
    for _ in range(2):
        layers = [*model.model.layers.parameters(), *model.model.layers.buffers()]
        assert all(tensor.is_meta for tensor in layers)
        torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    assert "offloaded" in model.get_submodule(UP).trace[-1].reason
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, token_ids), expected)


def test_a_model_on_meta_has_the_shapes_of_the_sparse_one(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert found == {name: tensor.shape for name, tensor in sparse.state_dict().items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("prepare", [prepare_for_training, lambda m: get_peft_model(m, lora())])
def test_gradient_checkpointing_changes_no_gradient(sparse, token_ids, prepare, reentrant):
    model = (prepare(sparse) or sparse).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        found = [p.grad.clone() for p in trained]
        model.zero_grad()
        return found

    expected = gradients()
    sparse.gradient_checkpointing_enable({"use_reentrant": reentrant})
    sparse.enable_input_require_grads()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_kbit_preparation_leaves_the_outputs_and_trains_the_adapter(sparse, token_ids):
    from peft import prepare_model_for_kbit_training

    expected = logits(sparse, token_ids)
    model = get_peft_model(prepare_model_for_kbit_training(sparse), lora())
    torch.testing.assert_close(logits(model, token_ids), expected)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_threads_share_a_model(sparse, token_ids):
    expected, found = logits(sparse, token_ids), {}

    def run(number):
        found[number] = [logits(sparse, token_ids) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(y, expected) for outputs in found.values() for y in outputs)


FORKED = """
import os, sys, torch, hf_sparse
from hf_sparse import SparseConfig

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(512, 512))
hf_sparse.prune(model, SparseConfig(method="magnitude"))
x = torch.randn(64, 512)
for threads, in_child in ((1, 2), (2, 2), (2, 1)):
    torch.set_num_threads(threads)
    expected = model(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(in_child)
        try:
            print("equal" if torch.allclose(model(x), expected, atol=1e-5) else "wrong")
        except hf_sparse.HfSparseError as error:
            print(error)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_forked_process_computes_or_says_why_it_would_wait_forever():
    env = os.environ | {"HF_SPARSE_MEASURE": "0", "TQDM_DISABLE": "1"}
    first, threads_lost, last = fresh.run(FORKED, env=env).stdout.splitlines()
    assert (first, last) == ("equal", "equal")
    assert "call torch.set_num_threads(1) in it first" in threads_lost


class Rows(torch.utils.data.Dataset):
    """Computes with a model in whatever process asks for a row."""

    def __init__(self, model, token_ids):
        self.model, self.token_ids = model, token_ids

    def __len__(self):
        return len(self.token_ids)

    def __getitem__(self, index):
        return logits(self.model, self.token_ids[index : index + 1])[0]


def test_the_workers_of_a_data_loader_compute_with_a_model(sparse, token_ids):
    loader = torch.utils.data.DataLoader(
        Rows(sparse, token_ids), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    torch.testing.assert_close(torch.cat(list(loader)), logits(sparse, token_ids))


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model):
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)


def sharded(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


def sharded_as_one_vector(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NO_SHARD")  # one process
        return torch.distributed.fsdp.FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True
        )


@pytest.mark.parametrize("part", [False, True])
def test_a_model_whose_weights_fsdp_has_spread_is_not_pruned(tiny, one_process, part):
    if part:
        tiny.model.layers[0] = sharded_as_one_vector(tiny.model.layers[0])
    model = tiny if part else sharded_as_one_vector(tiny)
    where = r"model\.layers\.0" if part else "the model"
    with pytest.raises(ConfigError, match=rf"{where} is wrapped in Full.*prune the model first"):
        hf_sparse.prune(model, SparseConfig(method="magnitude"))


@pytest.mark.parametrize("wrap", [distributed, sharded, sharded_as_one_vector])
@pytest.mark.parametrize("prepare", [prepare_for_training, lambda m: get_peft_model(m, lora())])
def test_wrapped_for_several_processes_it_has_the_same_gradients(
    sparse, token_ids, one_process, wrap, prepare
):
    other = copy.deepcopy(sparse)
    torch.manual_seed(0)
    model = prepare(sparse) or sparse
    torch.manual_seed(0)
    wrapped = wrap(prepare(other) or other)
    for each in (model, wrapped):
        each(input_ids=token_ids, labels=token_ids).loss.backward()
    grads, expected = (
        [p.grad for p in each.parameters() if p.requires_grad] for each in (wrapped, model)
    )
    grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_sparse_draft_assists_its_dense_model(tiny, token_ids):
    dense = copy.deepcopy(tiny).eval()
    hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    prompt = token_ids[:1]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(prompt, **settings)
    assert torch.equal(dense.generate(prompt, assistant_model=tiny.eval(), **settings), expected)
