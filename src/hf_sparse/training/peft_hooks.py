"""What PEFT has no hook for: counting sparse layers, and refusing to train copies of them.

PEFT counts the parameters of a model, and trains what `modules_to_save` names through copies of
its parameters; the kept values of a sparse layer are buffers. Two of its methods are wrapped, and
do as before on everything else.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.utils import ModulesToSaveWrapper

from ..core.errors import TrainingError
from ..layers import sparse_layers
from ..layers.counts import uncounted


def install() -> None:
    """Wrap the methods, once."""
    for cls in (PeftModel, PeftMixedModel):
        _wrap(cls, "get_nb_trainable_parameters", _count)
    _wrap(ModulesToSaveWrapper, "check_module", _check)


def _wrap(cls: Any, name: str, wrapper: Any) -> None:
    method = getattr(cls, name)
    if getattr(method, "func", None) is not wrapper:
        wrapped = functools.wraps(method)(lambda self: wrapper(method, self))
        wrapped.func = wrapper  # type: ignore[attr-defined]
        setattr(cls, name, wrapped)


def _count(method: Any, model: Any) -> tuple[int, int]:
    trained, total = method(model)
    return trained, total + uncounted(model)


def _check(method: Any, wrapper: Any) -> None:
    method(wrapper)
    fixed = [
        name for name, x in sparse_layers(wrapper.original_module).items() if not x.trains_values
    ]
    if fixed:
        inside = f" (it holds {', '.join(fixed)})" if fixed != [""] else ""
        raise TrainingError(
            f"modules_to_save names a sparse layer{inside}, whose kept values are no parameters "
            "and would not be trained: name it in target_modules to put an adapter on it, or train "
            "all kept values without an adapter, see hf_sparse.training.prepare_for_training"
        )
