"""What reads the options of a conversion: in the forms that people write them in, or one line that says what is wrong.

Errors call an option what the user calls it: `--finish-steps` on the command line, `finish_steps` in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tesseraq_gguf.arguments import Reader, choice, integer, path, refused, spelled
from tesseraq_gguf.compute.schemes import KEY_VALUE_BITS
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.recipe.rules import read_rules, size_of
from tesseraq_gguf.types.facts import names, tensor_type
from tesseraq_gguf.types.mixes import mix_of, spellings

AUTO = "auto"
"""Type of an embedding that is chosen within `target_size`."""

STOCK_NAME = "stock"
STOCK = names(lambda t: t.family and not t.custom and not t.recent)
"""Types that can be learned and that any llama.cpp reads, and what they are called together."""

FROM_FILE = "file:"
"""Stands before the path of a file to begin at."""


def size(name: str, value: Any) -> int:
    """Return bytes, given as a whole number or as text such as `1G`.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(value, str):
        return size_of(value)
    if isinstance(value, float):
        raise refused(name, value, "a whole number of bytes, or a size such as '200M'")
    return integer(name, value, 1, "byte")


def type_name(name: str, value: Any) -> str:
    """Return the name of a tensor type, given in any case.

    Raises:
        UsageError: there is no such type.
    """
    if not isinstance(value, str):
        raise refused(name, value, "the name of a tensor type")
    if mix_of(value):
        raise UsageError(f"{spelled(name)}: '{value}' is a mix of types, which {spelled('type')} alone takes")
    return tensor_type(value.strip()).name


def type_or_mix(name: str, value: Any) -> str:
    """Return the name of a tensor type or of a mix, given in any case.

    Raises:
        UsageError: there is no such thing.
    """
    if isinstance(value, str) and (mix := mix_of(value)):
        return mix.spelled
    try:
        return type_name(name, value)
    except UsageError as error:
        known = f". Mixes of llama-quantize: {', '.join(spellings())}" if isinstance(value, str) else ""
        raise UsageError(f"{error}{known}") from None


def rules(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Return rules as pairs (regular expression, type).

    They are given as a mapping, as pairs, as lines REGEX=TYPE, or as one text of such lines.

    Raises:
        UsageError: they are something else, or name no regular expression or no type.
    """
    if isinstance(value, str):
        return read_rules(value.splitlines())
    entries = value.items() if isinstance(value, Mapping) else value
    if not isinstance(entries, Iterable) or isinstance(entries, bytes):
        raise refused(name, value, "pairs (regular expression, type), a dict of these, or lines REGEX=TYPE")
    found: list[tuple[str, str]] = []
    for entry in entries:
        if isinstance(entry, str):
            found += read_rules([entry])
        elif isinstance(entry, tuple | list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            found += read_rules([f"{entry[0]}={entry[1]}"]) or read_rules([f"(?:{entry[0]})={entry[1]}"])
        else:
            raise refused(name, entry, "a pair (regular expression, type), or a line REGEX=TYPE")
    return tuple(found)


def candidates(name: str, value: Any) -> tuple[str, ...]:
    """Return types to choose from, given as strings, or as one with commas; `stock` is all of `STOCK`.

    Raises:
        UsageError: there are none, or an unknown one, or none that can be learned.
    """
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise refused(name, value, "names of tensor types")
    meant = [STOCK if one == STOCK_NAME else (one,) for one in given]
    found = tuple(dict.fromkeys(type_name(name, one) for types in meant for one in types))
    if all(tensor_type(type).is_float for type in found):
        raise UsageError(f"{spelled(name)} must name types to choose from, one of which at least can be learned")
    return found


def embedding_type(name: str, value: Any) -> str:
    """Return the name of a tensor type, or `AUTO`.

    Raises:
        UsageError: there is no such type.
    """
    return AUTO if isinstance(value, str) and value.strip().lower() == AUTO else type_name(name, value)


def initialisation(known: tuple[str, ...]) -> Reader:
    """Return what reads one of the names, or `FROM_FILE` and the path of a file."""
    named = choice("initialisation", (*known, f"{FROM_FILE}GGUF"))

    def read(name: str, value: Any) -> str:
        if isinstance(value, str) and value.startswith(FROM_FILE) and value != FROM_FILE:
            return f"{FROM_FILE}{path(name, value.removeprefix(FROM_FILE))}"
        if isinstance(value, str) and value.lower().endswith(".gguf"):
            raise UsageError(f"{spelled(name)} {value} is no initialisation: a file to begin at is {FROM_FILE}{value}")
        return str(named(name, value))

    return read


def key_value_bits(name: str, value: Any) -> int:
    """Return bits of keys and values.

    Raises:
        UsageError: it is no number, or none that they can have.
    """
    found = integer(name, value)
    if found not in KEY_VALUE_BITS:
        known = ", ".join(map(str, sorted(KEY_VALUE_BITS)))
        raise UsageError(f"{spelled(name)} {found} is not possible. There are: {known}")
    return found


def at_least(least: int, what: str = "") -> Reader:
    """Return what reads whole numbers that are no less; `what` is what they count."""
    return lambda name, value: integer(name, value, least, what)


def optional(read: Reader) -> Reader:
    """Return what reads the same, or leaves None."""
    return lambda name, value: None if value is None else read(name, value)
