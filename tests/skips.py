"""Skips that a complete machine may have, and the plugin that lets no other pass.

On a developer's machine a skip is a skip. With `--strict-skips`, as in CI, a test that skips for another reason than
those below fails: what it needs is to be installed there, or the reason to be named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

EXPECTED = (
    r"needs a GPU",
    r"needs nvcc, ",
    r"this processor has no \w+",  # both kinds of processors run these tests, one or the other
    r"this gguf does not know \w+",  # the newest release of gguf may be older than the newest type
    r"needs network namespaces, which only root",  # containers may keep them even from root
)
"""Regular expressions of reasons, from their beginnings."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test skips for a reason not expected")


def unexpected(longrepr: object) -> str | None:
    """Return why a test was skipped if that is none of the expected reasons."""
    reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
    return None if any(re.match(expected, reason) for expected in EXPECTED) else reason


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    _judge(item.config, outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome = yield
    _judge(collector.config, outcome.get_result())


def _judge(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    if not (config.getoption("--strict-skips") and report.outcome == "skipped") or hasattr(report, "wasxfail"):
        return
    reason = unexpected(report.longrepr)
    if reason is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, and nobody expected it (tests/skips.py has the reasons that are): {reason}"
