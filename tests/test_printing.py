"""What strangers wrote: nothing in it reaches a terminal as a command, and JSON is what every reader takes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tesseraq_gguf.printing import printable, to_json, tolerant_streams


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 日本語, 🦙", "plain, größer, 日本語, 🦙"),
        ("\x1b[31mred\x07\x9b", "\\x1b[31mred\\x07\\x9b"),
        ("two\nlines\ttab", "two\\nlines\\ttab"),
        ("a\u2028b", "a\\u2028b"),
        ("gpj.\u202ebad", "gpj.\\u202ebad"),
        ("caf\udce9", "caf\\udce9"),
        ("family: 👨\u200d👩\u200d👧", "family: 👨\u200d👩\u200d👧"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_to_be_kept_is_kept() -> None:
    assert printable("a\n\tb\x1b", "\n\t") == "a\n\tb\\x1b"


def refuse(constant: str) -> Any:
    raise AssertionError(f"not JSON: {constant}")


def test_json_is_strict() -> None:
    data = {
        "a": float("nan"),
        "b": [float("inf"), (-float("inf"), 1.5)],
        "c\udce9": "caf\udce9 🦙",
        "d": Path("x\udce9"),
    }
    text = to_json(data)
    text.encode("utf-8")
    assert json.loads(text, parse_constant=refuse) == {
        "a": "NaN",
        "b": ["Infinity", ["-Infinity", 1.5]],
        "c\ufffd": "caf\ufffd 🦙",
        "d": "x\ufffd",
    }
    assert "\\ud" not in text.replace("\\ud83e\\udd99", "")


def test_streams_replace_what_they_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdin", None)
    tolerant_streams()
    print("größer \udce9", flush=True)
    print("nowhere", file=sys.stderr)
    assert raw.getvalue() == b"gr??er ?\n"
    assert sys.stdin.read() == ""
