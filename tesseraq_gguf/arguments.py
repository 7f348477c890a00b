"""What a user may give as an argument, read in one way: on the command line, and from Python.

Errors call an argument what the user calls it: `--finish-steps` on the command line, `finish_steps` in Python.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import UsageError

Reader = Callable[[str, Any], Any]
"""Makes of an argument, given its name and what was given, what it means; raises `UsageError`."""

_LARGEST = 2**63 - 1

_SPELLINGS = {"model": "MODEL", "out": "OUT", "rules": "--tensor-type", "text": "--text", "file": "FILE"}
"""Options that are not called as their field is."""

ON_COMMAND_LINE: ContextVar[bool] = ContextVar("ON_COMMAND_LINE", default=False)
"""Whether the user writes options, and not arguments of Python."""


def spelled(name: str) -> str:
    """Return what the user calls an option: `--kv-bits` on the command line, `kv_bits` in Python."""
    return as_option(name) if ON_COMMAND_LINE.get() else name


def as_option(name: str) -> str:
    """Return what an option is called on the command line."""
    return _SPELLINGS.get(name, f"--{name.replace('_', '-')}")


def text(name: str, value: Any) -> str:
    """Return a name or a path, given as a string or as a path.

    Raises:
        UsageError: it is neither, or empty.
    """
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str):
        raise refused(name, value, "a string or a path")
    if not given.strip() or "\0" in given:
        raise UsageError(f"{spelled(name)} must not be empty" if "\0" not in given else f"{spelled(name)} is no name")
    return given


def secret(name: str, value: Any) -> str:
    """Return what must not be shown: a token, without the spaces and line ends that copying leaves around it.

    Raises:
        UsageError: it is no string of letters, digits and signs; the message does not repeat it.
    """
    found = value.strip() if isinstance(value, str) else ""
    if not (found.isascii() and found.isprintable()) or not found or " " in found:
        raise UsageError(f"{spelled(name)} must be a token, which has neither spaces nor letters beyond ASCII")
    return found


def path(name: str, value: Any) -> Path:
    """Return a path, given as a path or as a string.

    Raises:
        UsageError: it is neither, or empty.
    """
    return Path(text(name, value))


def integer(name: str, value: Any, least: int = 0, what: str = "") -> int:
    """Return a whole number: of Python or numpy. A float is none, even 32.0, nor is a bool.

    Args:
        name: of the option.
        value: as given.
        least: the least that it may be.
        what: it counts, for the message.

    Raises:
        UsageError: it is something else, too small, or of more than 63 bits.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise refused(name, value, "a whole number") from None
    if found < least:
        raise UsageError(f"{spelled(name)} must be at least {least}{what and f' {what}'}, not {found}")
    if found > _LARGEST:
        raise UsageError(f"{spelled(name)} must be less than 2^63")
    return found


def number(name: str, value: Any) -> float:
    """Return a number above 0, not a bool.

    Raises:
        UsageError: it is something else, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refused(name, value, "a number")
    found = float(value)
    if not (found > 0 and math.isfinite(found)):
        raise UsageError(f"{spelled(name)} must be a number above 0, not {found:g}")
    return found


def flag(name: str, value: Any) -> bool:
    """Return True or False, of Python or numpy.

    Raises:
        UsageError: it is something else.
    """
    given = value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
    if not isinstance(given, bool):
        raise refused(name, value, "True or False")
    return given


def choice(what: str, known: tuple[str, ...]) -> Reader:
    """Return what makes a name out of `known` of a field; `what` is said of names that are not among them."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise refused(name, value, f"one of {', '.join(known)}")
        found = value.strip().lower()
        if found not in known:
            raise UsageError(f"unknown {what} '{value}'. There are: {', '.join(known)}")
        return found

    return read


def device(name: str, value: Any) -> str:
    """Return the name of a device, given as a string or as torch's own."""
    return text(name, str(value) if type(value).__name__ == "device" else value)


def refused(name: str, value: Any, wanted: str) -> UsageError:
    """Return the error for what an argument cannot be; `wanted` says what it can."""
    shown = re.sub(r"\s+", " ", repr(value))
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UsageError(f"{spelled(name)} must be {wanted}, not {shown}")
