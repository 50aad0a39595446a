"""`SparseExperts`: the experts of a mixture as linear layers of their own, which can be packed.

transformers keeps the experts of a block in 3-D parameters, (experts, out, in) or, transposed,
(experts, in, out), and lets one of several functions compute with them. All of those keep to the
same contract (its decorator `use_experts_implementation`): weights `gate_up_proj` or `up_proj`, and
`down_proj`, with biases NAME_bias if `has_bias`; `_apply_gate` or `act_fn` between the two. A
module that keeps to it can be taken apart, and put together again, without knowing its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..kernels.operator import recorded
from .linear import SparseLinear
from .replace import replace_module
from .tied import tied_parameters


def is_fused(module: nn.Module) -> bool:
    """Does a module keep experts as 3-D parameters that transformers' contract describes?"""
    flags = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    if not all(hasattr(module, flag) for flag in flags):
        return False
    if getattr(module, "_is_expert_parallel", False) or not module.num_experts:
        return False
    weights = [module._parameters.get(name) for name in _projections(module)]
    return all(w is not None and w.ndim == 3 and len(w) == module.num_experts for w in weights)


def _projections(fused: Any) -> tuple[str, str]:
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


class _Expert(nn.Module):
    """One of the experts that a fused module has, on views of its weights."""

    # No submodule: what it holds beside the weights belongs to all experts.
    _fused: Any

    def __init__(self, fused: Any, index: int) -> None:
        super().__init__()
        for name in _projections(fused):
            self.add_module(name, _expert_layer(fused, name, index))
        self.__dict__["_fused"] = fused

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.children()
        fused, hidden = self._fused, up(x)
        hidden = fused._apply_gate(hidden) if fused.has_gate else fused.act_fn(hidden)
        y: Tensor = down(hidden)
        if getattr(fused, "has_post_expert_norm", False):
            y = fused.post_expert_norm(y)
        return y


class SparseExperts(nn.Module):
    """Experts that are a `Linear` or `SparseLinear` for each projection; called as the fused ones.

    The layers are named EXPERT.gate_up_proj (or EXPERT.up_proj) and EXPERT.down_proj. Only the
    experts that tokens are routed to compute.

    Under the fused weights' own names it has the number of experts, shape (1,): a reader that
    expects a weight there stops at the shape instead of making one up.

    Args:
        fused: a module for which `is_fused` holds. It loses its parameters: the layers' weights
            are views of them until they are packed or `settle` gives them memory of their own.
    """

    # What has the contract's attributes; no submodule: what it still holds is this one's, too.
    _fused: Any

    def __init__(self, fused: Any) -> None:
        super().__init__()
        for index in range(fused.num_experts):
            self.add_module(str(index), _Expert(fused, index))
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name in _projections(fused):
            number = torch.full((1,), fused.num_experts, device=getattr(fused, name).device)
            self.register_buffer(name, number)
            setattr(fused, name, None)
            if fused.has_bias:
                setattr(fused, f"{name}_bias", None)
        self.__dict__["_fused"] = fused

    @property
    def num_experts(self) -> int:
        """How many there are."""
        number: int = self._fused.num_experts
        return number

    def expert(self, index: int) -> nn.Module:
        """One expert: a module from (rows, hidden) to (rows, hidden)."""
        return self.get_submodule(str(index))

    def layers(self, expert: int) -> tuple[nn.Module, nn.Module]:
        """The layers before and after the activation of an expert."""
        up, down = self.expert(expert).children()
        return up, down

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each times its weight.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: the experts chosen for each token, (tokens, k), no one twice; numbers from
                `num_experts` on stand for none.
            top_k_weights: (tokens, k).
        """
        if recorded(hidden_states):
            return self._of_all(hidden_states, top_k_index, top_k_weights)
        tokens, k = top_k_index.shape
        outputs = hidden_states.new_zeros(tokens * k, hidden_states.shape[-1])
        for expert in torch.unique(top_k_index).tolist():
            if expert < self.num_experts:
                slots = chosen_slots(top_k_index, expert)
                found = self.expert(expert)(hidden_states[slots // k])
                outputs[slots] = found.to(outputs.dtype)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, k, outputs.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _of_all(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`forward` where something records what is computed: all experts compute for all tokens.

        Which of them are chosen depends on the data, and a trace would keep the choice.
        """
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            chosen = top_k_index == expert
            found = self.compute(expert, x).to(x.dtype)
            weight = (top_k_weights * chosen).sum(-1, keepdim=True)
            y = y + torch.where(chosen.any(-1, keepdim=True), found * weight, 0).to(x.dtype)
        return y

    def compute(self, expert: int, x: Tensor) -> Tensor:
        """One expert's outputs for all rows of x, (rows, hidden)."""
        up, down = self.layers(expert)
        hidden = up(x)
        fused = self._fused
        hidden = fused._apply_gate(hidden) if fused.has_gate else fused.act_fn(hidden)
        y: Tensor = down(hidden)
        if getattr(fused, "has_post_expert_norm", False):
            y = fused.post_expert_norm(y)
        return y

    def keep(self, kept: Sequence[int]) -> None:
        """Let all experts go but some, which are numbered anew in the order given."""
        experts = [self.expert(index) for index in kept]
        others = {n: m for n, m in self._modules.items() if not isinstance(m, _Expert)}
        self._modules.clear()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self._modules.update(others)
        self._fused.num_experts = len(experts)
        for name in _projections(self._fused):
            getattr(self, name).fill_(len(experts))

    def fused_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The 3-D parameters with the layers' weights as they are now, by their names."""
        fused = self._fused
        found: dict[str, Tensor] = {}
        for place, name in enumerate(_projections(fused)):
            weights, biases = [], []
            for expert in range(self.num_experts):
                layer = self.layers(expert)[place]
                with torch.no_grad(), align_module_device(layer):
                    weight: Tensor = layer.weight  # type: ignore[assignment]
                    weight = weight.T if fused.is_transposed else weight
                    weights.append(weight.to(dtype or weight.dtype))
                    if fused.has_bias:
                        biases.append(layer.bias.detach())  # type: ignore[union-attr,operator]
            found[name] = torch.stack(weights)
            if biases:
                found[f"{name}_bias"] = torch.stack(biases)
        return found

    def fuse(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module that this one was made of, with the weights as they are now."""
        for name, tensor in self.fused_tensors(dtype).items():
            setattr(self._fused, name, nn.Parameter(tensor))
        fused: nn.Module = self._fused
        return fused

    def settle(self) -> None:
        """Give layers that stay dense memory of their own, so that the fused weights' is free."""
        for expert in range(self.num_experts):
            for layer in self.layers(expert):
                if not isinstance(layer, SparseLinear):
                    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
                    weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def chosen_slots(top_k_index: Tensor, expert: int) -> Tensor:
    """Where an expert stands in the flattened (tokens, k) choice, ascending."""
    return (top_k_index.flatten() == expert).nonzero().flatten()


def tied_experts(model: nn.Module) -> set[str]:
    """Names of fused experts that share a weight: layers made of it would go their own ways."""
    ties = tied_parameters(model)
    return {
        name
        for name, module in model.named_modules()
        if is_fused(module) and any(f"{name}.{own}" in ties for own in module._parameters)
    }


def expert_tensors(experts: SparseExperts, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the fused tensors are in experts that were taken apart: views of them, by name.

    Args:
        experts: without contents, or with others.
        fused: the 3-D parameters and other tensors of the module that was taken apart, by name.
    """
    found = dict(fused)
    module = experts._fused
    for name in _projections(module):
        weights, biases = found.pop(name), found.pop(f"{name}_bias", None)
        found[name] = torch.full((1,), experts.num_experts)
        for index in range(experts.num_experts):
            weight = weights[index]
            found[f"{index}.{name}.weight"] = weight.T if module.is_transposed else weight
            if biases is not None:
                found[f"{index}.{name}.bias"] = biases[index].clone()
    return found


def unfuse(model: nn.Module, fused: nn.Module) -> None:
    """Put a `SparseExperts` in a fused module's place."""
    replace_module(model, fused, SparseExperts(fused))


def fuse(model: nn.Module, experts: SparseExperts, dtype: torch.dtype | None = None) -> None:
    """Put the fused module back, with the weights as they are now."""
    replace_module(model, experts, experts.fuse(dtype))


@contextmanager
def unfused_experts(model: nn.Module) -> Iterator[None]:
    """While this lasts, all experts in memory are linear layers; it leaves those with packed ones.

    Fused experts that accelerate has offloaded, or whose weights are tied, stay as they are.
    """
    tied = tied_experts(model)
    for name, module in [(n, m) for n, m in model.named_modules() if n and is_fused(m)]:
        offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        if name not in tied and not offloaded:
            unfuse(model, module)
    try:
        yield
    finally:
        for experts in [m for m in model.modules() if isinstance(m, SparseExperts)]:
            if any(isinstance(m, SparseLinear) for m in experts.modules()):
                experts.settle()
            else:
                fuse(model, experts)


def _expert_layer(fused: Any, name: str, index: int) -> nn.Linear:
    """A linear layer on an expert's part of a fused weight."""
    whole: Tensor = getattr(fused, name)
    weight = whole.detach()[index]
    weight = weight.T if fused.is_transposed else weight
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
    if fused.has_bias:
        biases: Tensor = getattr(fused, f"{name}_bias")
        bias = biases.detach()[index].clone()
        layer.bias = nn.Parameter(bias, requires_grad=biases.requires_grad)
    return layer
