"""Skips that a complete machine may have, and the plugin that lets no other pass.

On a developer's machine a skip is a skip. With `--strict-skips`, as in CI, a test that skips for another reason than
those below fails: what it needs is to be installed there, or the reason to be named here. So does one that lacks the
marker of what it needs, by which others leave it out (`-m "not gpu"`).
"""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest
from pluggy import Result

EXPECTED = (
    r"needs a GPU",
    r"needs nvcc, ",
    r"this processor has no \w+",  # both kinds of processors run these tests, one or the other
    r"this gguf does not know \w+",  # the newest release of gguf may be older than the newest type
    r"needs network namespaces, which only root",  # containers may keep them even from root
    r"needs Chromium",
    r"needs the web page",  # which npm builds
)
"""Regular expressions of reasons, from their beginnings."""

MARKERS = {r"needs a GPU": "gpu", r"needs network namespaces": "network"}
"""Markers of tests that skip for such reasons."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test skips for a reason not expected")


def reason_of(longrepr: object) -> str:
    """Return why a test was skipped."""
    return str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")


def complaint(reason: str, markers: set[str]) -> str | None:
    """Return what is wrong with a skip of a test with these markers, if anything is."""
    if not any(re.match(expected, reason) for expected in EXPECTED):
        return "nobody expected it (tests/skips.py has the reasons that are)"
    lacks = [marker for needs, marker in MARKERS.items() if re.match(needs, reason) and marker not in markers]
    return f"it lacks the marker {lacks[0]}" if lacks else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Result[pytest.TestReport], None]:
    outcome = yield
    _judge(item, outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, Result[pytest.CollectReport], None]:
    outcome = yield
    _judge(collector, outcome.get_result())


def _judge(node: pytest.Item | pytest.Collector, report: pytest.TestReport | pytest.CollectReport) -> None:
    strict = node.config.getoption("--strict-skips")
    if not (strict and report.outcome == "skipped") or hasattr(report, "wasxfail"):
        return
    reason = reason_of(report.longrepr)
    wrong = complaint(reason, {marker.name for marker in node.iter_markers()})
    if wrong is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, and {wrong}: {reason}"
