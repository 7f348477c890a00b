"""Which program learned a block: a hash of the sources that decide what is learned, and of no others.

Command line, chat, runtime and documentation may change between two runs of the same conversion; the blocks of the
first one still serve the second. After a change to what learns, they do not.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

LEARNING = (
    "compute", "gguf_files/column_orders", "gguf_files/dequantize", "methods", "models", "types",
    *(f"learning/{name}" for name in (
        "bit_budget", "calibration", "codebooks", "column_order", "embeddings", "mixture", "preprocessing",
        "reconstruction", "reordering", "rounding", "sensitivity",
    )),
)  # fmt: skip
"""Packages and modules that decide what is learned in the blocks."""

_HOME = Path(__file__).parents[1]


@cache
def learning_program(modules: tuple[str, ...] = LEARNING) -> str:
    """Return a hash of the sources of modules and packages, by default of those that decide what blocks learn."""
    digest = hashlib.sha256()
    for name, file in learning_sources(modules).items():
        digest.update(name.encode())
        digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def learning_sources(modules: tuple[str, ...] = LEARNING) -> dict[str, Path]:
    """Return the files that `learning_program` hashes, by their place in the package."""
    found: dict[str, Path] = {}
    for place in (_HOME / name for name in modules):
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        found |= {str(file.relative_to(_HOME)): file for file in files}
    return found
