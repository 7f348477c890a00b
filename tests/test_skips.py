"""Skips that nobody expected fail where a machine is to be complete, and only there."""

from __future__ import annotations

import pytest

TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="needs a GPU")
def test_expected():
    pass

@pytest.mark.skipif(True, reason="needs a GPU")
def test_without_its_marker():
    pass

def test_within():
    pytest.skip("this processor has no avx512f")

@pytest.mark.skipif(True, reason="needs a harp")
def test_unexpected():
    pass

@pytest.fixture
def strings():
    pytest.skip("its strings are missing")

def test_unexpected_in_a_fixture(strings):
    pass

@pytest.mark.xfail(reason="a harp is not in tune")
def test_is_known_to_fail():
    assert False
"""


@pytest.fixture
def some_tests(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest('pytest_plugins = ["skips"]')
    pytester.makepyfile(TESTS)
    return pytester


def test_locally_a_skip_is_a_skip(some_tests: pytest.Pytester) -> None:
    result = some_tests.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, skipped=5, xfailed=1)
    assert result.ret == 0


def test_a_complete_machine_has_no_others_than_those_expected(some_tests: pytest.Pytester) -> None:
    result = some_tests.runpytest_inprocess("-p", "no:cacheprovider", "--strict-skips", "-ra")
    result.assert_outcomes(passed=1, skipped=2, errors=3, xfailed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines_random(["*nobody expected it*: needs a harp", "*: its strings are missing"])
    result.stdout.fnmatch_lines(["*it lacks the marker gpu: needs a GPU"])
    result.stdout.fnmatch_lines_random(["SKIPPED*needs a GPU", "SKIPPED*this processor has no avx512f"])
    assert "3 errors" in result.outlines[-1]


def test_a_file_that_skips_as_a_whole_fails_too(some_tests: pytest.Pytester) -> None:
    some_tests.makepyfile(test_other='import pytest\npytest.importorskip("no_such_module")\n')
    assert some_tests.runpytest_inprocess("-p", "no:cacheprovider", "test_other.py").ret == 5  # no test was run
    result = some_tests.runpytest_inprocess("-p", "no:cacheprovider", "--strict-skips", "test_other.py")
    result.assert_outcomes(errors=1)
    assert result.ret != 0
    result.stdout.fnmatch_lines_random(["*nobody expected it*no_such_module*"])
