"""Write the reference of the recipe: every field with its option, default, meaning and where it applies; the tables.

Nothing of it is written by hand. Defaults and meanings are those of `Recipe`, groups and options those of
`tesseraq-gguf convert`, and where a field applies is found by making recipes with it: a field that would be ignored is
refused. `scripts/docs` puts the output into docs/reference/recipe.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

import typer

from tesseraq_gguf.cli import app as cli
from tesseraq_gguf.compute import schemes
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.methods import table
from tesseraq_gguf.methods.table import METHODS
from tesseraq_gguf.recipe import options
from tesseraq_gguf.recipe.presets import PRESETS, Preset
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.types.facts import TENSOR_TYPES
from tesseraq_gguf.types.mixes import MIXES

OPTIONS = {"rules": ("--tensor-type", "--tensor-types"), "model": ("MODEL",), "out": ("OUT",)}
"""Options of fields that have them by another name. Those of `processes` are torchrun's."""

GIVEN: Mapping[str, Mapping[str, Any]] = {
    "type": {"type": "tsq3"},
    "rules": {"rules": "down_proj=f16"},
    "target_bpw": {"target_bpw": 3.0},
    "target_size": {"target_size": "200M"},
    "candidates": {"candidates": "tsq2,tsq3"},
    "method": {"method": "gptq"},
    "init": {"init": "gptq"},
    "rotate": {"rotate": True},
    "finish": {"finish": "distill"},
    "finish_steps": {"finish_steps": 7},
    "rank": {"rank": 7},
    "parts": {"parts": "mask"},
    "granularity": {"granularity": "channel"},
    "activations": {"activations": "a8"},
    "kv_bits": {"kv_bits": 8},
    "codebooks": {"codebooks": "model"},
    "preprocess": {"preprocess": "text.txt"},
    "preprocess_steps": {"preprocess_steps": 7},
    "preset": {"preset": "fast"},
    "calibration": {"calibration": "text.txt"},
    "samples": {"samples": 7},
    "seqlen": {"seqlen": 64},
    "imatrix": {"imatrix": "imatrix.gguf"},
    "write_imatrix": {"write_imatrix": "imatrix.gguf"},
    "token": {"token": "hf_token"},
    "device": {"device": "cuda"},
    "memory_budget": {"memory_budget": "1G"},
    "embedding_type": {"embedding_type": "f16"},
    "output_type": {"output_type": "f16"},
    "mmproj": {"mmproj": "mmproj.gguf"},
    "mmproj_type": {"mmproj_type": "q8_0"},
    "no_mtp": {"no_mtp": True},
    "split": {"split": "4G"},
    "work_dir": {"work_dir": "work"},
    "fresh": {"fresh": True},
    "seed": {"seed": 7},
    "processes": {"processes": 2},
}
"""A value of every field that is not its default."""

COMPANIONS: Mapping[str, Mapping[str, Any]] = {
    "`target_bpw` or `target_size`": {"target_bpw": 3.0},
    "`finish`": {"finish": "distill"},
    "`preprocess`": {"preprocess": "text.txt"},
    "`mmproj`": {"mmproj": "mmproj.gguf"},
    "a type with codebooks": {"output_type": "bcq4"},
}
"""What some fields must go with, and a recipe that has it."""

TITLE = """# Recipe

Every field of a [`Recipe`](python.md), and the option of `tesseraq-gguf convert` that sets it. A
field that would be ignored is refused, so “applies” says where each may be given: it was found by
asking. `scripts/docs` makes this page of the program.
"""


def page() -> str:
    """Return the page."""
    groups: dict[str, list[str]] = {}
    for field in fields(Recipe):
        groups.setdefault(_group(field.name), []).append(_row(field))
    parts = [TITLE]
    for group, rows in groups.items():
        head = ["| field | option | default | meaning | applies |", "|---|---|---|---|---|"]
        parts += [f"## {group}\n", "\n".join([*head, *rows]) + "\n"]
    return "\n".join([*parts, _presets(), _methods(), _starts(), _types(), _mixes()])


def meanings(described: type) -> dict[str, str]:
    """Return what a class's docstring says of its attributes, by name, with the names of tables replaced by theirs.

    Raises:
        ValueError: it says nothing of one.
    """
    _, _, attributes = (inspect.getdoc(described) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    said = {name: " ".join(text.split()) for name, text in found}
    if missing := {field.name for field in fields(described)} - said.keys():  # type: ignore[arg-type]
        raise ValueError(f"{described.__name__} does not say what these mean: {', '.join(sorted(missing))}")
    return {
        name: re.sub(r"one of `(options|schemes|table)\.(\w+)`", _names, text).rstrip(".")
        for name, text in said.items()
    }


def _names(named: re.Match[str]) -> str:
    module = {"options": options, "schemes": schemes, "table": table}[named[1]]
    return f"one of {_list(list(getattr(module, named[2])))}"


def applies(name: str) -> str:
    """Say where a field may be given, by making recipes with it.

    Raises:
        ValueError: it may be given nowhere.
    """
    if name in ("model", "out"):
        return "always"
    given, needs = dict(GIVEN[name]), ""
    if not any(_allowed(method, given) for method in METHODS):
        needs = _needed(given)
        given |= COMPANIONS[needs]
    allowed = [method for method in METHODS if _allowed(method, given)]
    refused = [method for method in METHODS if method not in allowed]
    where = f"with {needs}" if needs else ""
    if refused:
        those = f"not with {_list(refused)}" if len(refused) < len(allowed) else f"with {_list(allowed)}"
        where = f"{where}, {those}" if where else those
    elif name not in ("type", "method") and not needs and not _made(type="f16", **given):
        where = "where something is learned"
    return where or "always"


def _needed(given: Mapping[str, Any]) -> str:
    for needs, companion in COMPANIONS.items():
        if any(_allowed(method, dict(given) | dict(companion)) for method in METHODS):
            return needs
    raise ValueError(f"no recipe takes {given}")


def _allowed(method: str, given: Mapping[str, Any]) -> bool:
    return _made(**({"method": method} | dict(given)))


def _made(**given: Any) -> bool:
    try:
        Recipe("model", Path("out.gguf"), **given)
    except UsageError:
        return False
    return True


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(field: Field[Any]) -> str:
    spellings = " ".join(f"`{option}`" for option in OPTIONS.get(field.name, _options().get(field.name, ())))
    default = "" if field.default is MISSING else _shown(field.default)
    cells = (f"`{field.name}`", spellings, default, meanings(Recipe)[field.name], applies(field.name))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    return f"`{default}`"


def _convert() -> Any:
    return typer.main.get_command(cli.app).commands["convert"]  # type: ignore[attr-defined]


def _options() -> dict[str, list[str]]:
    return {parameter.name: parameter.opts for parameter in _convert().params}


def _group(name: str) -> str:
    """Return under what `convert --help` lists a field."""
    return options.OPTIONS[name].group or "Fields"


def _presets() -> str:
    names = [field.name for field in fields(Preset)]
    rows = [
        f"| `{name}` | {meanings(Preset)[name]} | "
        + " | ".join(f"{asdict(preset)[name]:g}" for preset in PRESETS.values())
        + " |"
        for name in names
    ]
    head = [
        "| figure | meaning | " + " | ".join(f"`{name}`" for name in PRESETS) + " |",
        "|---|---|" + "---:|" * len(PRESETS),
    ]
    return "## What presets stand for\n\n" + "\n".join([*head, *rows]) + "\n"


_GRIDS = {"": "all", "uniform": "those with evenly spaced values", "ordered": "those whose columns have an order"}
"""Types that a method works in, by what it needs of a grid."""


def _methods() -> str:
    rows = [
        (
            f"`{row.name}`",
            row.summary,
            "`init`" if row.begins else "",
            ", ".join(f"`{option}`" for option in row.options),
            _GRIDS[row.needs],
            "yes" if row.calibrates else "no",
        )
        for row in METHODS.values()
    ]
    head = ("`method`", "does", "begins at", "own options", "types", "needs text")
    return f"## Methods\n\n{_table(head, rows)}\n"


def _starts() -> str:
    rows = [(f"`{row.name}`", row.summary, _GRIDS[row.needs]) for row in (*table.STARTS.values(), table.FILE)]
    return f"## What learning begins at\n\n{_table(('`init`', 'does', 'types'), rows)}\n"


def _types() -> str:
    rows = [
        (
            f"`{type.name}`",
            f"{type.bits_per_weight:g}",
            str(type.block_weights),
            str(type.id),
            "our runtime" if type.custom else "a recent llama.cpp" if type.recent else "any llama.cpp",
            f"`{type.fallback or 'f16'}`" if not type.is_float else "",
        )
        for type in TENSOR_TYPES.values()
    ]
    head = ("`type`", "bits per weight", "rows are a multiple of", "id in the file", "runs on", "other rows get")
    return f"## Tensor types\n\n{_table(head, rows)}\n"


def _mixes() -> str:
    rows = [(f"`{mix.spelled}`", mix.name.upper(), str(mix.file_type)) for mix in MIXES.values()]
    head = ("`type`", "llama-quantize calls it", "`general.file_type`")
    said = "They give every matrix of the file the type that the runtime's llama-quantize gives it."
    return f"## Mixes\n\n{said}\n\n{_table(head, rows)}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print(page())
