"""Cases that share a test: each is run, and the one that fails is named."""

import pytest
from cases import in_one_test


def test_every_case_runs_whatever_others_skip():
    ran = []

    @in_one_test(a=[1, 2, 3], b=["x", "y"])
    def cases(a, b, c):
        if a == 1:
            pytest.skip("not this one")
        ran.append((a, b, c))

    cases(c=0)
    assert ran == [(2, "x", 0), (2, "y", 0), (3, "x", 0), (3, "y", 0)]


def test_it_is_skipped_if_no_case_runs():
    @in_one_test(a=[1, 2])
    def cases(a):
        pytest.skip("none")

    with pytest.raises(pytest.skip.Exception, match="none"):
        cases()


def test_the_case_that_fails_is_named():
    @in_one_test(a=[1, 2])
    def cases(a):
        assert a == 1

    with pytest.raises(AssertionError) as caught:
        cases()
    assert caught.value.__notes__ == ["with {'a': 2}"]
