"""How activations are rounded, as data: what the command line names and a file's metadata keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tesseraq_gguf.errors import FileFormatError, UsageError

SCHEMES = ("none", "a8-static", "a8", "a6", "a4", "a3")
"""How what matrices are fed is rounded: `a8-static` in one range per tensor, the others in one per token."""

KEY_VALUE_BITS = (8, 6, 4, 3)

ACTIVATIONS_KEY = "tesseraq.activations"
"""Metadata of a GGUF file whose matrices were learned with rounded activations."""

Range = tuple[float, float]
"""Lowest and highest value."""


@dataclass(frozen=True)
class ActivationScheme:
    """What is rounded, and how.

    Attributes:
        bits: of what the matrices of the blocks are fed; None leaves it.
        static: one range per tensor, measured on calibration text, in place of one per token.
        key_value_bits: of keys and values; None leaves them.
    """

    bits: int | None = None
    static: bool = False
    key_value_bits: int | None = None

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return self.bits is not None or self.key_value_bits is not None

    def __str__(self) -> str:
        fed = "" if self.bits is None else f"a{self.bits}" + ("-static" if self.static else "")
        kept = "" if self.key_value_bits is None else f"kv{self.key_value_bits}"
        return " ".join(part for part in (fed, kept) if part) or "none"


def scheme_of(name: str, key_value_bits: int | None) -> ActivationScheme:
    """Return the scheme that is called so.

    Args:
        name: one of `SCHEMES`.
        key_value_bits: one of `KEY_VALUE_BITS`, or None.

    Raises:
        UsageError: there is none of that name, or not with so many bits.
    """
    if name not in SCHEMES:
        raise UsageError(f"unknown rounding of activations '{name}'. There are: {', '.join(SCHEMES)}")
    if key_value_bits is not None and key_value_bits not in KEY_VALUE_BITS:
        known = ", ".join(map(str, sorted(KEY_VALUE_BITS)))
        raise UsageError(f"--kv-bits {key_value_bits} is not possible. There are: {known}")
    static = name.endswith("-static")
    bits = None if name == "none" else int(name.removesuffix("-static")[1:])
    return ActivationScheme(bits, static, key_value_bits)


def to_metadata(scheme: ActivationScheme, ranges: Mapping[str, Range]) -> str:
    """Return scheme and static ranges, by the matrices' checkpoint names, as JSON."""
    bounds = {name: [float(f"{bound:.9g}") for bound in r] for name, r in ranges.items()}
    return json.dumps(asdict(scheme) | ({"ranges": bounds} if bounds else {}))


def from_metadata(text: str) -> tuple[ActivationScheme, dict[str, Range]]:
    """Return what `to_metadata` was given.

    Raises:
        FileFormatError: it is something else.
    """
    try:
        entries = json.loads(text)
        ranges = {name: (float(low), float(high)) for name, (low, high) in entries.pop("ranges", {}).items()}
        return ActivationScheme(**entries), ranges
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"its entry {ACTIVATIONS_KEY} cannot be read: {error}") from None
