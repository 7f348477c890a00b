"""A folder of GGUF files, as the router of llama.cpp's server takes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tesseraq_gguf.errors import FileFormatError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.parts import part_of

_COMPANION = re.compile(r".*mmproj|mtp-|dspark-|dflash-")
"""Files that the router takes for companions of a model, by their names."""


def check_folder(folder: Path) -> list[str]:
    """Refuse a folder that the router finds no model in. Returns what it will list and cannot serve, a line for each.

    Raises:
        UsageError: it is no folder, or there is no model in it.
    """
    if not folder.is_dir():
        raise UsageError(f"--models wants a folder, and {folder} is none")
    try:
        listed = list(_listed(folder))
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read: {error.strerror or error}") from None
    complaints = {file: reason for file in listed if (reason := _why_not(file))}
    if len(complaints) < len(listed):
        return [f"{file.name} is listed, and cannot be served: {reason}" for file, reason in complaints.items()]
    for file, reason in complaints.items():
        raise UsageError(f"{folder} has no model to serve: of {file.name}, {reason}")
    raise UsageError(f"{folder} has no GGUF files, neither itself nor in its folders")


def _listed(folder: Path) -> Iterator[Path]:
    """The files that the router makes models of, as it looks for them: a file each, or a folder each."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and _is_model(entry):
            yield entry
        elif entry.is_dir():
            models = sorted(file for file in entry.iterdir() if file.is_file() and _is_model(file))
            yield from models[:1]  # of a split file, the first part


def _is_model(file: Path) -> bool:
    return file.name.endswith(".gguf") and not _COMPANION.match(file.name)


def _why_not(file: Path) -> str:
    """Why a file that is listed cannot be served; empty if it can."""
    named = part_of(file.name)
    if named and named.index:
        return "it is a part of a split file; parts are hidden in a folder of their own"
    try:
        kind = open_gguf(file).get("general.type", "model")
    except FileFormatError as error:
        return str(error)
    return "" if kind == "model" else f"it is no model, but of the kind {kind!r}"
