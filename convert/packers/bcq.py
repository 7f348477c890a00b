"""BCQ types: blocks of 64 weights, value d·c, an unsigned 8-bit float d and a codeword c of a codebook of 16.

Eight neighbouring weights share one of eight codebooks of integers from -31 to 31. Byte 0 of a block is the E5M3 code of
d, as in TSQ types; bytes 1 to 3 are eight selectors of 3 bits, little-endian, selector k from bit 3k up; then come 64
indices of 4 bits in two planes, those of TSQ4: byte 4 + j has weight j in its low bits and weight j + 32 in its high
ones. BCQ4 and BCQ4_A4 have the same bytes. See docs/formats.md.

The codebooks are universal, `UNIVERSAL`, unless a file brings its own in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.converter.packers.tsq import decode_scale

BLOCK = 64
"""Weights per block."""

GROUP = 8
"""Weights that share a selector."""

CODEBOOKS = 8
LEVELS = 16
BLOCK_BYTES = 36

LARGEST = 31
"""Largest magnitude of a codeword."""

METADATA = "tesseraq.bcq.codebooks"
"""GGUF key of a file's own codebooks: an array of 128 int8, codebook after codebook."""

_FILE = Path(__file__).with_name("bcq_codebooks.json")


def read_codebooks(values: Any) -> NDArray[np.int8]:
    """Check codebooks: int8 [8, 16], ascending, of magnitudes up to 31.

    Raises:
        ValueError: they are not.
    """
    codebooks = np.asarray(values)
    if codebooks.size != CODEBOOKS * LEVELS or not np.issubdtype(codebooks.dtype, np.integer):
        raise ValueError(f"BCQ codebooks are {CODEBOOKS} times {LEVELS} integers")
    codebooks = codebooks.reshape(CODEBOOKS, LEVELS)
    if np.abs(codebooks).max() > LARGEST or (np.diff(codebooks, axis=1) < 0).any():
        raise ValueError(f"BCQ codewords ascend and have magnitudes up to {LARGEST}")
    return codebooks.astype(np.int8)


def write_universal(codebooks: NDArray[np.int8]) -> None:
    """Make codebooks, int8 [8, 16], the universal ones: of Python, and of C in a source tree."""
    rows = [[int(c) for c in row] for row in read_codebooks(codebooks)]
    _FILE.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")
    header = Path(__file__).parents[2] / "cpp_kernels" / "bcq-codebooks.h"
    if header.parent.is_dir():
        lines = ", \\\n".join("    { " + ", ".join(f"{c:3d}" for c in row) + " }" for row in rows)
        header.write_text(_HEADER.format(lines=lines), encoding="utf-8")


_HEADER = """\
#pragma once

// The universal codebooks of BCQ types, written by scripts/design_codebooks; convert/packers/bcq_codebooks.json holds the same
// numbers for Python.

#define BCQ_UNIVERSAL_CODEBOOKS \\
{lines}
"""


def _universal() -> NDArray[np.int8]:
    return read_codebooks(json.loads(_FILE.read_text(encoding="utf-8")))


UNIVERSAL: NDArray[np.int8] = _universal() if _FILE.is_file() else np.zeros((8, 16), np.int8)
"""The universal codebooks, int8 [8, 16]."""
