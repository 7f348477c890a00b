"""Options of a conversion: what each may be, and which have no effect together. The command line and Python share it.

Errors call an option what the user calls it: `--finish-steps` on the command line, `finish_steps` in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

from tesseraq_gguf.arguments import Reader, choice, device, flag, integer, number, path, refused, spelled, text
from tesseraq_gguf.compute.schemes import KEY_VALUE_BITS, SCHEMES
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.methods.table import METHODS, PARTS, STARTS
from tesseraq_gguf.recipe.rules import read_rules, size_of
from tesseraq_gguf.types.facts import ORDERED_TYPES, TENSOR_TYPES, WITH_CODEBOOKS, tensor_type

if TYPE_CHECKING:
    from tesseraq_gguf.recipe.recipe import Recipe

INITIALISATIONS = ("auto", *STARTS)
"""What methods can begin at; `auto` is the start that serves best (`Recipe.start`)."""

FINISHES = ("none", "distill")
"""Last passes over the whole model."""

GRANULARITIES = ("group", "channel")
"""What shares a scale and a zero-point."""

AUTO = "auto"
"""Type of an embedding that is chosen within `target_size`."""

CODEBOOKS = ("universal", "model")
"""Where types with codebooks have them from."""

PRESET_NAMES = ("fast", "balanced", "best")


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
    return tensor_type(value.strip()).name


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
    """Return types to choose from, given as strings, or as one with commas.

    Raises:
        UsageError: there are none, or an unknown one, or none that can be learned.
    """
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise refused(name, value, "names of tensor types")
    found = tuple(dict.fromkeys(type_name(name, one) for one in given))
    if all(tensor_type(type).is_float for type in found):
        raise UsageError(f"{spelled(name)} must name types to choose from, one of which at least can be learned")
    return found


def _embedding_type(name: str, value: Any) -> str:
    return AUTO if isinstance(value, str) and value.strip().lower() == AUTO else type_name(name, value)


def _bits(name: str, value: Any) -> int:
    found = integer(name, value)
    if found not in KEY_VALUE_BITS:
        known = ", ".join(map(str, sorted(KEY_VALUE_BITS)))
        raise UsageError(f"{spelled(name)} {found} is not possible. There are: {known}")
    return found


def _at_least(least: int, what: str = "") -> Reader:
    return lambda name, value: integer(name, value, least, what)


def _optional(read: Reader) -> Reader:
    return lambda name, value: None if value is None else read(name, value)


FIELDS: dict[str, Reader] = {
    "model": text,
    "out": path,
    "type": type_name,
    "rules": rules,
    "target_bpw": _optional(number),
    "target_size": _optional(size),
    "candidates": candidates,
    "method": choice("method", tuple(METHODS)),
    "init": choice("initialisation", INITIALISATIONS),
    "rotate": flag,
    "finish": choice("finish", FINISHES),
    "finish_steps": _optional(_at_least(1)),
    "rank": _optional(_at_least(1)),
    "parts": choice("part of PTQ1.61", PARTS),
    "granularity": choice("granularity", GRANULARITIES),
    "activations": choice("rounding of activations", SCHEMES),
    "kv_bits": _optional(_bits),
    "codebooks": choice("kind of codebooks", CODEBOOKS),
    "preprocess": _optional(text),
    "preprocess_steps": _optional(_at_least(1)),
    "preset": choice("preset", PRESET_NAMES),
    "calibration": _optional(text),
    "samples": _optional(_at_least(1)),
    "seqlen": _optional(_at_least(8, "tokens")),
    "device": device,
    "memory_budget": _optional(size),
    "embedding_type": _optional(_embedding_type),
    "output_type": _optional(type_name),
    "work_dir": _optional(path),
    "fresh": flag,
    "seed": _at_least(0),
    "processes": _at_least(1),
}
"""What reads each field of a `Recipe`."""

_OF_ANY = {"model", "out", "type", "rules", "embedding_type", "output_type", "processes"}
"""Fields that have a meaning where nothing is learned."""

_CALIBRATION = ("preset", "calibration", "samples", "seqlen", "memory_budget")


def refuse_conflicts(recipe: Recipe, given: Set[str]) -> None:
    """Refuse options that contradict each other, or that would be ignored.

    Args:
        recipe: its fields are read.
        given: names of the fields that the user gave.

    Raises:
        UsageError: naming the first that is found.
    """
    _refuse_contradictions(recipe, given)
    _refuse_types(recipe)
    for names, reason in _useless(recipe):
        for name in names:
            if name in given:
                raise UsageError(f"{reason}: {spelled(name)} has no meaning there")


def _refuse_contradictions(recipe: Recipe, given: Set[str]) -> None:
    if recipe.target_bpw is not None and recipe.target_size is not None:
        raise UsageError(f"{spelled('target_bpw')} and {spelled('target_size')} are two budgets: give one")
    if "type" in given and recipe.budgeted:
        raise UsageError(
            f"{spelled('type')} gives all matrices one type, a target chooses among {spelled('candidates')}: "
            "give one of them"
        )
    if recipe.embedding_type == AUTO and recipe.target_size is None:
        raise UsageError(f"the type of the embedding can be chosen with {spelled('target_size')} only: name one")
    if not recipe.learns:
        return
    finish = spelled("finish")
    if recipe.scheme.rounds and recipe.finish != "none":
        raise UsageError(f"{finish} learns with activations as they are: it is not possible with rounded ones")
    if recipe.granularity == "channel" and recipe.finish != "none":
        raise UsageError(
            f"{finish} moves the scale of every group: it is not possible with {spelled('granularity')} channel"
        )
    if "finish_steps" in given and recipe.finish == "none":
        raise UsageError(f"{spelled('finish_steps')} must go with {finish} distill")
    if "preprocess_steps" in given and recipe.preprocess is None:
        raise UsageError(f"{spelled('preprocess_steps')} must go with {spelled('preprocess')} TEXT")


def _refuse_types(recipe: Recipe) -> None:
    for name in ("embedding_type", "output_type"):
        if (type := getattr(recipe, name)) in ORDERED_TYPES:
            raise UsageError(without_order(type))
    if recipe.learns:
        return
    wanted = {spelled(name): getattr(recipe, name) for name in ("embedding_type", "output_type")}
    wanted |= {f"{spelled('rules')} {pattern}": type for pattern, type in recipe.rules}
    for what, type in wanted.items():
        if type is not None and not tensor_type(type).plain:
            plain = ", ".join(t.name for t in TENSOR_TYPES.values() if t.plain)
            raise UsageError(
                f"{what}: '{type}' can only be learned, and with {spelled('type')} {recipe.type} nothing is: "
                f"choose one of {plain}"
            )


def without_order(type: str) -> str:
    """Say that embedding and output matrix cannot have a type."""
    return f"{type} is for matrices in the blocks: columns of the embedding have no order"


def _is(name: str) -> str:
    return "are" if name.endswith("s") else "is"


def _useless(recipe: Recipe) -> list[tuple[Iterable[str], str]]:
    """Fields that a choice makes useless, each with the reason."""
    method, found = f"{spelled('method')} {recipe.method}", list[tuple[Iterable[str], str]]()
    if not recipe.learns:
        return [([n for n in FIELDS if n not in _OF_ANY], f"{spelled('type')} {recipe.type} learns nothing")]
    if not recipe.budgeted:
        found.append((["candidates"], "there is no target to choose types for"))
    row = recipe.method_row
    if not row.calibrates:
        found.append((["init", "finish", "rank"], f"{method} learns nothing"))
        if not recipe.calibrates:
            # preprocessing takes its steps from the preset, and sequences of that length
            kept = ("preset", "seqlen") if recipe.preprocess else ()
            found.append(([n for n in _CALIBRATION if n not in kept], f"{method} uses no calibration"))
        elif not recipe.preprocess:
            found.append((["preset"], f"{method} learns nothing"))
    elif not row.begins:
        found.append((["init", "rank"], f"{method} knows one way"))
    for owner in METHODS.values():
        if owner is not row:
            found += [([name], f"{spelled(name)} {_is(name)} {owner.name}'s alone") for name in owner.options]
    types = {*(recipe.candidates if recipe.budgeted else (recipe.type,)), recipe.embedding_type, recipe.output_type}
    if not (types | {type for _, type in recipe.rules}) & set(WITH_CODEBOOKS):
        found.append((["codebooks"], f"{recipe.type} has none"))
    return found
