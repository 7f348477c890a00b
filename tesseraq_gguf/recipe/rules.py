"""Rules that name tensor types, REGEX=TYPE, and sizes, as users write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.mixes import mix_of


def read_rules(lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Read rules REGEX=TYPE, one in a line; empty lines and lines that begin with # are skipped.

    Raises:
        UsageError: a line is something else, or the type is unknown.
    """
    rules = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        pattern, equals, type = line.rpartition("=")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"'{line}': {pattern} is no regular expression: {error}") from None
        if not equals or not pattern:
            raise UsageError(f"'{line}' is not of the form REGEX=TYPE, such as mlp.down_proj=tsq3")
        if mix_of(type):
            raise UsageError(f"'{line}': {type.strip()} is a mix of types, which {spelled('type')} alone takes")
        rules.append((pattern.strip(), tensor_type(type.strip()).name))
    return tuple(rules)


def ruled(rules: Sequence[tuple[str, str]], name: str) -> str | None:
    """Return the type that the last rule which matches a name gives it, or None."""
    return next((type for pattern, type in reversed(rules) if re.search(pattern, name)), None)


def rules_of(types: Mapping[str, str], said: str) -> str:
    """Write a choice as rules, to read, edit and replay; `said` opens it as a comment."""
    lines = [f"# {line}" for line in said.splitlines()]
    return "\n".join([*lines, *(f"{name}={type}" for name, type in types.items())]) + "\n"


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def size_of(text: str) -> int:
    """Read a size such as 200M, 1.5G, 700MiB or plain bytes.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if not found or found[2] not in _UNITS or not 0 < float(found[1]) * _UNITS[found[2]] < 2**63:
        raise UsageError(f"'{text}' is no size: give bytes, or a number with K, M, G, KiB, MiB or GiB")
    return int(float(found[1]) * _UNITS[found[2]])
