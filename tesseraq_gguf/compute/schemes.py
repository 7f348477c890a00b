"""How activations are rounded, as data: what the command line names and a file's metadata keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tesseraq_gguf.errors import FileFormatError, UsageError

SCHEMES = ("none", "a8-static", "a8", "a6", "a4", "a3", "a8-blocks", "a4-blocks", "a4-codebooks", "a4-fp4")
"""How what matrices are fed is rounded: `a8-static` in one range per tensor, those without a word in one per token, the
others as kernels do it: `a8-blocks` is what ours make of activations, `a4-codebooks` what those of BCQ4_A4 do."""

FORMS = ("range", "static", "blocks", "codebooks", "fp4")
"""Where the levels of rounded activations lie: evenly in a range of a token, or of a tensor; evenly around 0 in blocks
of 64; in BCQ's codebooks; or where NVFP4 has them."""

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
        form: where the levels lie, one of `FORMS`.
        key_value_bits: of keys and values; None leaves them.
    """

    bits: int | None = None
    form: str = "range"
    key_value_bits: int | None = None

    @property
    def static(self) -> bool:
        """Whether there is one range per tensor, measured on calibration text."""
        return self.form == "static"

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return self.bits is not None or self.key_value_bits is not None

    def __str__(self) -> str:
        fed = "" if self.bits is None else f"a{self.bits}" + ("" if self.form == "range" else f"-{self.form}")
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
    if name == "none":
        return ActivationScheme(key_value_bits=key_value_bits)
    bits, _, form = name.removeprefix("a").partition("-")
    return ActivationScheme(int(bits), form or "range", key_value_bits)


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
        if entries.pop("static", False):  # files of version 0.1
            entries["form"] = "static"
        scheme = ActivationScheme(**entries)
        if scheme.form not in FORMS:
            raise ValueError(f"there is no form '{scheme.form}'")
        return scheme, ranges
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"its entry {ACTIVATIONS_KEY} cannot be read: {error}") from None
