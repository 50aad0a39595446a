"""The native library: that it is built here, and what is said where it isn't."""

import pytest

from hf_sparse.kernels.cpu import library


def test_the_native_library_is_built_where_these_tests_run():
    assert library.unavailable_reason() is None
    assert "scalar" in library.paths()


def test_a_missing_library_says_why(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: "no _tiles library in /somewhere")
    assert not library.available()
    assert "unavailable: no _tiles" in library.describe()
    with pytest.raises(library.NativeUnavailableError, match="no _tiles"):
        library.library()
