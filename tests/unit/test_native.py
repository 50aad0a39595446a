"""The native library: that it is built here, and what is said where it isn't."""

import pytest

from hf_sparse.kernels import native


def test_the_native_library_is_built_where_these_tests_run():
    assert native.unavailable_reason() is None
    assert "scalar" in native.paths()


def test_a_missing_library_says_why(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: "no _t16 library in /somewhere")
    assert not native.available()
    assert "unavailable: no _t16" in native.describe()
    with pytest.raises(native.NativeUnavailableError, match="no _t16"):
        native.library()
