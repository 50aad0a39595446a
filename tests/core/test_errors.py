"""The exception tree is what the module's text draws."""

import inspect
import re

import pytest

import hf_sparse
from hf_sparse.core import errors

BASES = (ValueError, ArithmeticError, OSError, ImportError, RuntimeError)
BUILTIN = {base.__name__: base for base in BASES}


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Class name -> (parent, built-in base) as the docstring draws it."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        found = re.match(r"^((?:│   |    )*)(├── |└── )?([A-Z]\w+(?:Error|Warning))\b(.*)$", line)
        if found is None:
            continue
        depth = len(found[1]) // 4 + 1 if found[2] else 0
        builtin = re.search(r"\((\w+)\)\s*$", found[4])
        path[depth:] = [found[3]]
        tree[found[3]] = (path[depth - 1] if depth else None, builtin[1] if builtin else None)
    return tree


def exception_classes() -> dict[str, type]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }


def test_the_drawing_names_every_exception_and_no_other():
    assert set(drawn_tree()) == set(exception_classes())
    assert "CheckpointError" in drawn_tree()


@pytest.mark.parametrize("name", sorted(drawn_tree()))
def test_bases_are_as_drawn(name):
    parent, builtin = drawn_tree()[name]
    classes = exception_classes()
    expected = {classes[parent] if parent else Exception} | (
        {BUILTIN[builtin]} if builtin else set()
    )
    assert set(classes[name].__bases__) == expected


def test_every_exception_is_public_and_documented():
    for name, cls in exception_classes().items():
        assert getattr(hf_sparse, name) is cls
        assert name in hf_sparse.__all__
        assert cls.__doc__
