"""Formats of one's own: what `register_format` takes, and what it says to the rest."""

from dataclasses import dataclass

import pytest

from hf_sparse import RegistrationError, register_format
from hf_sparse.formats import FORMATS, Bitmask, Layout


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(FORMATS, "_classes", dict(FORMATS))


def layout(name):
    return dataclass(frozen=True)(type("Own", (Bitmask,), {"name": name}))


def test_a_registered_layout_is_a_format_of_its_name():
    cls = layout("own")
    assert register_format(cls) is cls
    assert FORMATS["own"] is cls


@pytest.mark.parametrize("name", ["bitmask", "n:m", "quantized", "auto", "", 3])
def test_a_name_that_is_taken_or_none_is_refused(name):
    before = list(FORMATS)
    with pytest.raises(RegistrationError):
        register_format(layout(name))
    assert list(FORMATS) == before


def test_the_formats_that_exist_are_named():
    with pytest.raises(RegistrationError, match="Taken are dense, n:m, bitmask"):
        register_format(layout("bitmask"))


def test_a_layout_that_lacks_a_method_or_is_not_frozen_is_refused():
    class Half(Layout):
        name = "half"

    with pytest.raises(RegistrationError, match="Half lacks check, count, fits"):
        register_format(Half)
    with pytest.raises(RegistrationError, match=r"Soft must be a @dataclass\(frozen=True\)"):
        register_format(dataclass(type("Soft", (Layout,), dict(vars(Bitmask)) | {"name": "soft"})))
