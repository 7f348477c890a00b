"""BCQ types: blocks of 64 weights, value d·c, an unsigned 8-bit float d and a codeword c of a codebook of 16.

Eight neighbouring weights share one of eight codebooks of integers from -31 to 31. Byte 0 of a block is the E5M3 code
of d, as in TSQ types; bytes 1 to 3 are eight selectors of 3 bits, little-endian, selector k from bit 3k up; then come
64 indices of 4 bits in two planes, those of TSQ4: byte 4 + j has weight j in its low bits and weight j + 32 in its
high ones. BCQ4 and BCQ4_A4 have the same bytes. See docs/formats.md.

The codebooks are universal, `UNIVERSAL`, unless a file brings its own in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types import e5m3

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

_FILE = Path(__file__).with_name("codebooks.json")


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
    header = Path(__file__).parents[3] / "cpp_kernels" / "bcq" / "bcq4-codebooks.h"
    if header.parent.is_dir():
        lines = ", \\\n".join("    { " + ", ".join(f"{c:3d}" for c in row) + " }" for row in rows)
        header.write_text(_HEADER.format(lines=lines), encoding="utf-8")


_HEADER = """\
#pragma once

// The universal codebooks of BCQ4, written by scripts/design_codebooks; tesseraq_gguf/types/bcq/codebooks.json holds the same numbers
// for Python.

#define BCQ4_UNIVERSAL_CODEBOOKS \\
{lines}
"""  # noqa: E501


UNIVERSAL: NDArray[np.int8] = read_codebooks(json.loads(_FILE.read_text(encoding="utf-8")))
"""The universal codebooks, int8 [8, 16]."""


def codebooks_of(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int8]:
    """Codebooks, int8 [8, 16], of a matrix: its own, which every row repeats under `c`, or the universal ones."""
    return arrays["c"][0].reshape(CODEBOOKS, LEVELS) if "c" in arrays else UNIVERSAL


def repeated(codebooks: NDArray[np.int8], rows: int) -> NDArray[np.int8]:
    """Return codebooks as an array of a matrix: int8 [rows, 128]."""
    return np.tile(codebooks.reshape(1, -1), (rows, 1))


@dataclass(frozen=True)
class BcqPacker:
    """Packer of BCQ types.

    Its arrays: indices `q` uint8 [rows, columns], selectors `s` uint8 [rows, columns / 8], E5M3 codes `d` uint8
    [rows, columns / 64]; and `c` int8 [rows, 128], the same in every row, where codebooks are not the universal ones. A
    file has these once, in its metadata; `unpack` does not know them.
    """

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes]. Shapes and codes out of range are a ValueError."""
        q, s, d = arrays["q"], arrays["s"], arrays["d"]
        rows, columns = q.shape
        blocks = columns // BLOCK
        if columns % BLOCK or s.shape != (rows, blocks * BLOCK // GROUP) or d.shape != (rows, blocks):
            raise ValueError(f"BCQ arrays do not fit together: q {q.shape}, s {s.shape}, d {d.shape}")
        if q.size and (int(q.max()) >= LEVELS or int(s.max()) >= CODEBOOKS):
            raise ValueError(f"a BCQ index is above {LEVELS - 1}, or a selector above {CODEBOOKS - 1}")
        shifts = np.arange(0, 24, 3, dtype=np.uint32)
        words = (s.reshape(rows, blocks, 8).astype(np.uint32) << shifts).sum(2, dtype=np.uint32) << 8 | d
        heads = words.astype("<u4").view(np.uint8).reshape(rows, blocks, 4)
        planes = q.reshape(rows, blocks, 2, BLOCK // 2)
        indices = planes[:, :, 0] | planes[:, :, 1] << np.uint8(4)
        return np.concatenate([heads, indices], axis=2).reshape(rows, -1)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        rows = data.shape[0]
        blocks = np.ascontiguousarray(data).reshape(rows, -1, BLOCK_BYTES)
        words = np.ascontiguousarray(blocks[:, :, :4]).view("<u4")
        s = (words >> np.arange(8, 32, 3, dtype=np.uint32) & 7).astype(np.uint8).reshape(rows, -1)
        planes = np.stack([blocks[:, :, 4:] & np.uint8(15), blocks[:, :, 4:] >> np.uint8(4)], axis=2)
        return {"q": planes.reshape(rows, -1), "s": s, "d": blocks[:, :, 0].copy()}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns]: d·c, exact in float32."""
        q, s, d = arrays["q"], arrays["s"], arrays["d"]
        codewords = codebooks_of(arrays).reshape(-1)[np.repeat(s, GROUP, axis=1) * LEVELS + q]
        return codewords.astype(np.float32) * np.repeat(e5m3.decode(d), BLOCK, axis=1)


BCQ4 = BCQ4_A4 = BcqPacker()
