"""Which program learned a block: a hash of the sources that decide what is learned, and of no others.

Command line, chat, runtime and documentation may change between two runs of the same conversion; the blocks of the
first one still serve the second. After a change to what learns, they do not.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

LEARNING = (
    "activations", "affine", "bit_budget", "calibration", "codebooks", "column_order", "embeddings", "finite", "fusion",
    "grids", "held_out", "hidden_states", "kernel_arithmetic", "methods", "models", "parallel", "preprocessing",
    "quantized", "rare_experts", "reconstruction", "reordering", "residual_rotation", "sensitivity",
)  # fmt: skip
"""Modules and packages that decide what is learned in the blocks."""

_CONVERTER = ("column_orders", "dequantize", "packers")
"""Modules and packages of the converter that learning shares: codebooks, how scales are coded, how files are read."""


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
    from tesseraq_gguf import converter

    home, shared = Path(__file__).parent, Path(str(converter.__file__)).parent
    found: dict[str, Path] = {}
    for place in (*(home / name for name in modules), *(shared / name for name in _CONVERTER)):
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        found |= {str(file.relative_to(place.parent)): file for file in files}
    return found
