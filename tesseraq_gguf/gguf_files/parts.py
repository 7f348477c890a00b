"""A model in several files, as llama.cpp has them: what the parts are called, what each holds, how they appear.

    NAME-00001-of-00003.gguf      all metadata, and the first tensors
    NAME-00002-of-00003.gguf      the tensors that follow
    NAME-00003-of-00003.gguf      the rest

Every part is a GGUF file that says which it is: `split.no` u16 from 0, `split.count` u16, and `split.tensors.count`
i32, of all parts together. The first is the one to open; the others are found by its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
"""Keys of a part: which it is, of how many, and how many tensors all hold."""

LARGEST_COUNT = (1 << 16) - 1
"""Parts that `split.count` can count."""

SUFFIX = ".gguf"

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class PartName:
    """What the name of a part says.

    Attributes:
        stem: what the names of all parts begin with.
        index: which part it is, from 0.
        count: of how many.
    """

    stem: str
    index: int
    count: int


def part_name(stem: str, index: int, count: int) -> str:
    """Return the name of a part, `index` being counted from 0."""
    return f"{stem}-{index + 1:05}-of-{count:05}{SUFFIX}"


def part_of(name: str) -> PartName | None:
    """Return what the name of a file says of a part; None if it is none of one."""
    found = _NAME.fullmatch(name)
    return PartName(found[1], int(found[2]) - 1, int(found[3])) if found else None


def parts_of(out: Path) -> list[Path]:
    """Return the parts beside a file that are named after it, whatever their count."""
    found = ((path, part_of(path.name)) for path in out.parent.iterdir())
    return sorted(path for path, named in found if named and named.stem == out.name.removesuffix(SUFFIX))


def shared_out(sizes: Iterable[int], header: int, most: int) -> list[int]:
    """Say how many tensors each part holds, in their order, so that no part has more than `most` bytes.

    A tensor that is larger has a part of its own. No part is empty, but the first may be: metadata can be large.

    Args:
        sizes: bytes of each tensor, its entry in the header and the padding behind it included.
        header: bytes of the metadata.
        most: bytes of a part.
    """
    counts, filled = [0], header
    for size in sizes:
        if filled + size > most and filled:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return counts


def moved(parts: Sequence[Path], folder: Path) -> list[Path]:
    """Move parts, or a file that is whole, into a folder, and return where they are.

    The first part comes last, and one that was there goes first: what can be opened is whole at any time.
    """
    for part in parts:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    if len(parts) > 1:
        (folder / parts[0].name).unlink(missing_ok=True)
    for part in reversed(parts):
        part.replace(folder / part.name)
    return [folder / part.name for part in parts]
