"""Registering: what is refused, with what to do about it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import pytest

import hf_sparse
from hf_sparse.config.recipes import RECIPES
from hf_sparse.core.errors import ConfigError, RegistrationError
from hf_sparse.core.registry import Registry, unknown_name
from hf_sparse.core.statistics import Needs
from hf_sparse.solvers import SOLVERS, Solution, Solver


class Shape(ABC):
    name: ClassVar[str]

    @abstractmethod
    def area(self): ...

    @abstractmethod
    def corners(self): ...


def shape(name, base=Shape):
    return type("Mine", (base,), {"name": name, "area": lambda self: 1, "corners": lambda self: 4})


@pytest.fixture
def shapes():
    return Registry("shape", Shape, [shape("circle"), shape("square")], reserved=["auto"])


def test_a_registry_is_read_like_a_dict_in_the_order_of_registration(shapes):
    cls = shapes.register(shape("oval"))
    assert list(shapes) == ["circle", "square", "oval"]
    assert shapes["oval"] is cls
    assert len(shapes) == 3
    assert "triangle" not in shapes
    assert shapes.find("oval") is cls


def test_a_class_can_stand_before_another(shapes):
    shapes.register(shape("oval"), before="square")
    assert list(shapes) == ["circle", "oval", "square"]
    with pytest.raises(ConfigError, match="shape='sqare' does not exist; did you mean 'square'"):
        shapes.register(shape("star"), before="sqare")
    assert list(shapes) == ["circle", "oval", "square"]


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (shape("circle"), ["'circle' exists already", "circle, square"]),
        (shape("auto"), ["'auto' means something else"]),
        (shape("cir cle"), ["'cir cle'", "letters"]),
        (shape("\x1b[31m"), ["letters"]),
        (shape(""), ["''", "letters"]),
        (shape(3), ["is 3", "letters"]),
        (type("Nameless", (Shape,), {"area": None, "corners": None}), ["Nameless.name is None"]),
        (type("Half", (Shape,), {"name": "half", "area": None}), ["Half lacks corners"]),
        (type("Other", (), {"name": "other"}), ["Other", "no subclass of Shape"]),
        (shape("oval")(), ["no subclass of Shape"]),
        ("oval", ["'oval' is no subclass of Shape"]),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_with_the_reason(shapes, cls, words):
    with pytest.raises(RegistrationError) as caught:
        shapes.register(cls)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(shapes) == ["circle", "square"]


@pytest.mark.parametrize("name", ["triangle", "", None, 3, ["circle"]])
def test_an_unknown_name_is_answered_with_those_that_exist(shapes, name):
    with pytest.raises(ConfigError) as caught:
        shapes.find(name)
    assert str(caught.value) == f"shape={name!r} does not exist: pass one of circle, square"


def test_a_misspelt_name_is_answered_with_the_near_one():
    said = unknown_name("method", "spargegpt", ["wanda", "sparsegpt"])
    assert said == (
        "method='spargegpt' does not exist; did you mean 'sparsegpt'? Pass one of wanda, sparsegpt"
    )


# --- methods --------------------------------------------------------------------------------


def solver(**changes):
    """A frozen solver class, with attributes changed or (None) left out."""
    attributes = {"name": "mine", "needs": Needs.NOTHING, "chooses_pattern": False} | changes
    attributes["solve"] = lambda self, weight, statistics, pattern: Solution(weight, weight != 0)
    cls = type("Mine", (Solver,), {k: v for k, v in attributes.items() if v is not None})
    return dataclass(frozen=True)(cls)


@pytest.fixture
def no_traces(monkeypatch):
    monkeypatch.setattr(SOLVERS, "_classes", dict(SOLVERS))


def test_a_registered_method_is_one_like_any_other(no_traces):
    cls = hf_sparse.register_solver(solver())
    assert hf_sparse.SparseConfig(method="mine").solver == "mine"
    assert SOLVERS["mine"] is cls


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (solver(needs=2), "Mine.needs is 2: set it to a Needs"),
        (solver(needs=None), "Mine.needs is None"),
        (solver(chooses_pattern="no"), "Mine.chooses_pattern is 'no': set it to a bool"),
        (solver(name="sparsegpt"), "'sparsegpt' exists already"),
        *((solver(name=name), f"{name!r} is a recipe already") for name in RECIPES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_that_a_run_could_not_use_is_refused(no_traces, cls, words):
    with pytest.raises(RegistrationError) as caught:
        hf_sparse.register_solver(cls)
    assert words in str(caught.value)


def test_a_method_with_a_field_that_no_config_has_is_refused(no_traces):
    cls = type("Mine", (solver(),), {"__annotations__": {"temperature": float}, "temperature": 1.0})
    with pytest.raises(RegistrationError, match=r"Mine has a field 'temperature'.*ClassVar"):
        hf_sparse.register_solver(dataclass(frozen=True)(cls))


def test_a_method_that_is_no_frozen_value_is_refused(no_traces):
    class Plain(Solver):
        name = "plain"
        needs = Needs.NOTHING
        chooses_pattern = False

        def solve(self, weight, statistics, pattern):
            return Solution(weight, weight != 0)

    with pytest.raises(RegistrationError, match=r"Plain must be a @dataclass\(frozen=True\)"):
        hf_sparse.register_solver(Plain)
