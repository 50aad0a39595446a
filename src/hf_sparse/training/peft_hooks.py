"""What PEFT has no hook for: sparse layers and previewed heads that get adapters.

PEFT counts the parameters of a model, and trains what `modules_to_save` names through copies of
its parameters; the kept values of a sparse layer are buffers. An adapter sees a layer's inputs
before the layer does, and changes what a head's preview was made of. Some of its methods are
wrapped, and do as before on everything else.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..core.errors import AdapterError, TrainingError
from ..core.logging import get_logger
from ..layers import SparseLinear, sparse_layers
from ..layers.counts import uncounted
from ..layers.head_preview import PreviewedHead, drop_preview

logger = get_logger(__name__)


def install() -> None:
    """Wrap the methods, once."""
    for counted in (PeftModel, PeftMixedModel):
        _wrap(counted, "get_nb_trainable_parameters", _count)
    _wrap(ModulesToSaveWrapper, "check_module", _check)
    _wrap(BaseTuner, "inject_adapter", _inject)
    for kind in (BOFTLayer, IA3Layer, OFTLayer):
        for adapter in kind.__subclasses__():
            _wrap(adapter, "merge", _merge)


def settle_adapters(model: nn.Module) -> None:
    """Let adapters compute what they can be merged to: beside a layer with a threshold they see
    the inputs that count, and a head with an adapter has no preview."""
    for tuner in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
        base = tuner.get_base_layer()
        if isinstance(base, PreviewedHead):
            drop_preview(base)
            logger.warning(
                "the head has an adapter now, so all its scores are exact: call "
                "hf_sparse.preview_head again once the adapter is merged into it"
            )
        with_threshold = isinstance(base, SparseLinear) and base.threshold is not None
        if with_threshold and _inputs_that_count not in tuner._forward_pre_hooks.values():
            tuner.register_forward_pre_hook(_inputs_that_count)


def check_inputs_stay(name: str, tuner: Any) -> None:
    """Raise an AdapterError for an adapter that changes what a layer with a threshold is given: in
    a merged weight that would come after small inputs have gone, not before."""
    base = tuner.get_base_layer()
    changes = isinstance(tuner, BOFTLayer | OFTLayer) or getattr(tuner, "is_feedforward", False)
    if changes and isinstance(base, SparseLinear) and base.threshold is not None:
        raise AdapterError(
            f"layer {name} takes inputs up to {base.threshold.value:.4g} for 0, and its adapter "
            f"({type(tuner).__module__}) changes them before: merged, it gives other outputs. Keep "
            "it beside the layer, or take one that adds to the weight, as LoRA does"
        )


def _inputs_that_count(tuner: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    threshold = getattr(tuner.get_base_layer(), "threshold", None)
    return inputs if threshold is None else (threshold.apply(inputs[0]), *inputs[1:])


def _wrap(cls: Any, name: str, wrapper: Any) -> None:
    method = getattr(cls, name)
    if getattr(method, "func", None) is not wrapper:

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return wrapper(method, self, *args, **kwargs)

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


def _inject(method: Any, tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    method(tuner, model, *args, **kwargs)
    settle_adapters(model)


def _merge(method: Any, tuner: Any, *args: Any, **kwargs: Any) -> None:
    check_inputs_stay(type(tuner).__name__, tuner)
    method(tuner, *args, **kwargs)
