"""What llama.cpp says when something fails: many lines, of which the first that means something says why."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MARK = re.compile(r"^[\d.]+ ([A-Z]) +")
"""What programs put before a line: the time since their start and a level, `E` for errors."""

_SPEAKER = re.compile(
    r"^(?:cmn +)?(?:\w*_[\w:~]*|error loading model(?: hyperparameters| vocabulary| tensors)?|"
    r"parse: error parsing grammar): +(?=\S)"
)
"""Who says it: names of functions, and the same in words."""

_SAYS_NOTHING = re.compile(
    r"failed to (?:load|create|read (?:key-value pairs|tensor info))|unable to (?:load|create)|exiting|"
    r"encountered an error while trying to fit|error: $",
    re.IGNORECASE,
)
"""What follows from an error that was told before."""

_SOUNDS_BAD = re.compile(r"error|failed|unable|invalid|what\(\)|GGML_ASSERT|GGML_ABORT", re.IGNORECASE)
"""Lines without a mark that may be errors."""

_LONGEST = 300


def errors_in(said: str) -> list[str]:
    """Return the lines of a program's output that are errors, by their mark or, without one, by their words."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return [line for line in lines if (mark[1] == "E" if (mark := _MARK.match(line)) else _SOUNDS_BAD.search(line))]


def first_reason(errors: Iterable[str]) -> str | None:
    """Return the first error that says why, without who says it; None if there are none.

    Args:
        errors: lines that are errors, in their order.
    """
    first = None
    for line in errors:
        text = _bare(line)
        if text and not _SAYS_NOTHING.match(text):
            return text
        first = first or text
    return first


def _bare(line: str) -> str:
    text = _MARK.sub("", line.strip())
    while (shorter := _SPEAKER.sub("", text)) != text:
        text = shorter
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
