"""What picks the pairs that are attended to exactly, one file each."""

from __future__ import annotations

from ....core.registry import Registry
from ..base import Selector
from .block import BlockSelector
from .mongoose import MongooseSelector
from .own import OwnSelector
from .routing import RoutingSelector
from .smyrf import SmyrfSelector

SELECTORS: Registry[Selector] = Registry(
    "selector",
    Selector,  # type: ignore[type-abstract]
    (OwnSelector, BlockSelector, SmyrfSelector, RoutingSelector, MongooseSelector),
)
