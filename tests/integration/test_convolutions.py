"""Pointwise convolutions of a network: pruned, stored, reloaded, and dense again."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import hf_sparse
from hf_sparse import CheckpointError, SparseConfig
from hf_sparse.calibration.block_walk import BlockWalk
from hf_sparse.calibration.layer_statistics import collect_statistics
from hf_sparse.core.statistics import Needs
from hf_sparse.layers.blocks import find_blocks
from hf_sparse.layers.conv import SparseConv2d


@pytest.fixture
def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in range(3)]


@pytest.fixture
def resnet() -> ResNetForImageClassification:
    """Bottlenecks: a pointwise convolution, one of 3x3, a pointwise one."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck"
    )
    model = ResNetForImageClassification(config).eval()
    with torch.no_grad():  # running statistics of 0 and 1 would leave nothing to test
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


def logits(model, images) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in images])


def pointwise(model) -> dict[str, nn.Module]:
    """Prunable convolutions, by what torch says of them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and (module.kernel_size, module.stride) == ((1, 1), (1, 1))
    }


@pytest.mark.parametrize(
    ("settings", "zeros"),
    [
        ({"sparsity": 0.5}, lambda n: n // 2),
        ({"sparsity": 0.7, "method": "wanda"}, None),
        ({"pattern": "2:4"}, lambda n: n // 2),
        ({"method": "best"}, None),
        ({"sparsity": 0.5, "bits": 8, "group_size": 8}, None),
        ({"pattern": "2:4", "low_rank": 2}, None),
    ],
    ids=["sparsegpt", "wanda", "2:4", "best", "8 bits", "low rank"],
)
def test_they_are_pruned_saved_and_reloaded_to_the_same_bits(
    resnet, images, tmp_path, settings, zeros
):
    expected = set(pointwise(resnet))
    report = hf_sparse.prune(resnet, SparseConfig(dataset=images, **settings))
    assert {layer.name for layer in report.layers} == expected
    assert len(expected) == 7  # two of each bottleneck, and the one shortcut of stride 1
    for layer in report.layers:
        module = resnet.get_submodule(layer.name)
        assert isinstance(module, SparseConv2d)
        assert module.weight.shape == (*layer.shape, 1, 1)
        if zeros is not None:
            found = int((module.weight == 0).sum())
            assert found == layer.zeros == zeros(module.weight.numel())
    embedder = "resnet.embedder.embedder.convolution"
    assert report.left_dense[embedder] == "a convolution of kernel size 7x7, no linear layer"
    before = logits(resnet, images)
    resnet.save_pretrained(tmp_path / "sparse")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, images), before)
    hf_sparse.export_dense(again, tmp_path / "dense")
    dense = ResNetForImageClassification.from_pretrained(tmp_path / "dense")
    assert all(type(module) is nn.Conv2d for module in pointwise(dense).values())
    torch.testing.assert_close(logits(dense, images), before, rtol=1e-4, atol=1e-4)
    back = again.dequantize()
    assert all(type(module) is nn.Conv2d for module in pointwise(back).values())
    torch.testing.assert_close(logits(back, images), before, rtol=1e-4, atol=1e-4)


def test_their_statistics_are_those_of_the_channels_at_every_position(resnet, images):
    blocks = find_blocks(resnet, list(pointwise(resnet)))
    entering: dict[str, list[torch.Tensor]] = {name: [] for name in pointwise(resnet)}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, n=name: entering[n].append(args[0].double())
        )
        for name, module in pointwise(resnet).items()
    ]
    logits(resnet, images)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for visit in BlockWalk(resnet, blocks, images):
            layers = {name: resnet.get_submodule(name) for name in visit.block.targets}
            for name, seen in collect_statistics(visit, layers, Needs.HESSIAN).items():
                x = torch.cat(entering[name])
                pixels = [
                    x[b, :, i, j]
                    for b in range(len(x))
                    for i in range(x.shape[2])
                    for j in range(x.shape[3])
                ]
                rows = torch.stack(pixels)
                assert seen.statistics.tokens == len(rows)
                hessian = seen.statistics.hessian.double()
                torch.testing.assert_close(hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial", [1, 3, -1, True, "2"])
def test_a_checkpoint_that_says_other_axes_is_refused(resnet, images, tmp_path, spatial):
    hf_sparse.prune(resnet, SparseConfig(method="magnitude"))
    resnet.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert all(v["spatial"] == 2 for v in json.loads(metadata["hf_sparse"])["layers"].values())
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    changed = metadata["hf_sparse"].replace('"spatial":2', f'"spatial":{json.dumps(spatial)}')
    header["__metadata__"]["hf_sparse"] = changed
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(CheckpointError, match=r"spatial|is packed from shape"):
        ResNetForImageClassification.from_pretrained(tmp_path)
