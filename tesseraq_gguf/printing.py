"""What is printed of strings and numbers that strangers wrote: terminals take some characters for commands."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any, TextIO

_REORDERING = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the order in which a terminal shows others; emoji need the rest of their category."""

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories: control characters, lone surrogates, separators of lines and paragraphs."""


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey or cannot show, as Python does in a string: `\\x1b`.

    Args:
        text: any string, of a file's metadata or from a model.
        keep: characters to leave alone: line ends of a text that has some.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _disturbs(c) else c.encode("unicode_escape").decode() for c in text)


def _disturbs(character: str) -> bool:
    return character in _REORDERING or unicodedata.category(character) in _UNPRINTABLE


def short(value: float) -> str:
    """Return a number with four digits, without an exponent as long as that is readable."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def to_json(data: Any) -> str:
    """Return JSON that every reader takes: numbers that are not finite are strings, lone surrogates are replaced."""
    return json.dumps(_strict(data), indent=2, default=str, allow_nan=False)


def _strict(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, str):
        return data if data.isascii() else data.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(data, dict):
        return {_strict(key): _strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_strict(value) for value in data]
    return _strict(str(data)) if isinstance(data, os.PathLike) else data


def tolerant_streams() -> None:
    """Let stdout and stderr replace what their encoding does not have. Those that are closed are as good as empty."""
    if sys.stdin is None:  # `<&-`
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  (as long as the process)
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")
