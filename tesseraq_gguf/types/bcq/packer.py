"""BCQ types: blocks of 64 weights, value d·c, an unsigned 8-bit float d and a codeword c, an integer of 6 bits.

A few neighbouring weights share one of a few codebooks: 8 weights of BCQ4 one of 8 with 16 codewords, 16 weights of
BCQ2 one of 4 with 4. Byte 0 of a block is the E5M3 code of d, as in TSQ types. Then come the selectors, little-endian,
of 3 or 2 bits each, and 64 indices of 4 or 2 bits in the planes of TSQ4 or TSQ2. BCQ4 and BCQ4_A4 have the same bytes.
See docs/formats.md.

The codebooks are universal, those of `universal`, unless a file brings its own in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.facts import TENSOR_TYPES, Codebooks
from tesseraq_gguf.types.tsq.packer import from_planes, to_planes

BLOCK = 64
"""Weights per block, for all BCQ types."""

_HOME = Path(__file__).parent


def shape_of(type: str) -> Codebooks:
    """Return what the codebooks of a BCQ type are."""
    shape = TENSOR_TYPES[type].codebooks
    assert shape is not None
    return shape


def read_codebooks(values: Any, shape: Codebooks) -> NDArray[np.int8]:
    """Check codebooks: int8 [codebooks, levels], ascending, none of a larger magnitude than the shape allows.

    Raises:
        ValueError: they are not.
    """
    codebooks = np.asarray(values)
    if codebooks.size != shape.count * shape.levels or not np.issubdtype(codebooks.dtype, np.integer):
        raise ValueError(f"BCQ codebooks are {shape.count} times {shape.levels} integers")
    codebooks = codebooks.reshape(shape.shape).astype(np.int64)  # -128 has no magnitude in int8
    if np.abs(codebooks).max() > shape.largest or (np.diff(codebooks, axis=1) < 0).any():
        raise ValueError(f"BCQ codewords ascend and have magnitudes up to {shape.largest}")
    return codebooks.astype(np.int8)


@cache
def universal(shape: Codebooks) -> NDArray[np.int8]:
    """The universal codebooks, int8 [codebooks, levels]."""
    return read_codebooks(json.loads((_HOME / f"{shape.layout}.json").read_text(encoding="utf-8")), shape)


def write_universal(codebooks: NDArray[np.int8], shape: Codebooks) -> None:
    """Make codebooks, int8 [codebooks, levels], the universal ones: of Python, and of C in a source tree."""
    rows = [[int(c) for c in row] for row in read_codebooks(codebooks, shape)]
    content = "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"
    (_HOME / f"{shape.layout}.json").write_text(content, encoding="utf-8")
    header = _HOME.parents[2] / "cpp_kernels" / "bcq" / f"{shape.layout}-codebooks.h"
    if header.parent.is_dir():
        lines = ", \\\n".join("    { " + ", ".join(f"{c:3d}" for c in row) + " }" for row in rows)
        header.write_text(_HEADER.format(name=shape.layout, macro=shape.layout.upper(), lines=lines), encoding="utf-8")


_HEADER = """\
#pragma once

// The universal codebooks of {macro}, written by `scripts/run design codebooks`; tesseraq_gguf/types/bcq/{name}.json holds the same
// numbers for Python.

#define {macro}_UNIVERSAL_CODEBOOKS \\
{lines}
"""  # noqa: E501


def codebooks_of(arrays: Mapping[str, NDArray[Any]], shape: Codebooks) -> NDArray[np.int8]:
    """Codebooks of a matrix: its own, which every row repeats under `c`, or the universal ones."""
    return arrays["c"][0].reshape(shape.shape) if "c" in arrays else universal(shape)


def repeated(codebooks: NDArray[np.int8], rows: int) -> NDArray[np.int8]:
    """Return codebooks as an array of a matrix: int8 [rows, codebooks · levels]."""
    return np.tile(codebooks.reshape(1, -1), (rows, 1))


@dataclass(frozen=True)
class BcqPacker:
    """Packer of BCQ types.

    Its arrays: indices `q` uint8 [rows, columns], selectors `s` uint8 [rows, columns / group], E5M3 codes `d` uint8
    [rows, columns / 64]; and `c` int8 [rows, codebooks · levels], the same in every row, where codebooks are not the
    universal ones. A file has these once, in its metadata; `unpack` does not know them.

    Attributes:
        shape: of the codebooks.
    """

    shape: Codebooks

    @property
    def _selectors(self) -> int:
        """Of a block."""
        return BLOCK // self.shape.group

    @property
    def _selector_shifts(self) -> NDArray[np.uint32]:
        """Lowest bit of each selector in a word that has the code of d below them, uint32 [selectors]."""
        return 8 + np.arange(self._selectors, dtype=np.uint32) * np.uint32((self.shape.count - 1).bit_length())

    @property
    def _head(self) -> int:
        """Bytes of a block before its indices."""
        return 1 + self._selectors * (self.shape.count - 1).bit_length() // 8

    @property
    def _bits(self) -> int:
        """Of an index."""
        return (self.shape.levels - 1).bit_length()

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes]. Shapes and codes out of range are a ValueError."""
        q, s, d = arrays["q"], arrays["s"], arrays["d"]
        rows, columns = q.shape
        blocks = columns // BLOCK
        if columns % BLOCK or s.shape != (rows, blocks * self._selectors) or d.shape != (rows, blocks):
            raise ValueError(f"BCQ arrays do not fit together: q {q.shape}, s {s.shape}, d {d.shape}")
        if q.size and (int(q.max()) >= self.shape.levels or int(s.max()) >= self.shape.count):
            raise ValueError(
                f"a BCQ index is above {self.shape.levels - 1}, or a selector above {self.shape.count - 1}"
            )
        selectors = s.reshape(rows, blocks, self._selectors).astype(np.uint32)
        words = (selectors << self._selector_shifts).sum(2, dtype=np.uint32) | d
        heads = words.astype("<u4").view(np.uint8).reshape(rows, blocks, 4)[:, :, : self._head]
        indices = to_planes(q.reshape(rows, blocks, BLOCK), self._bits)
        return np.concatenate([heads, indices], axis=2).reshape(rows, -1)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        rows = data.shape[0]
        blocks = data.reshape(rows, -1, self._head + BLOCK * self._bits // 8)
        words = np.zeros((*blocks.shape[:2], 4), np.uint8)
        words[:, :, : self._head] = blocks[:, :, : self._head]
        s = words.view("<u4") >> self._selector_shifts & np.uint32(self.shape.count - 1)
        q = from_planes(blocks[:, :, self._head :], self._bits)
        return {"q": q.reshape(rows, -1), "s": s.astype(np.uint8).reshape(rows, -1), "d": blocks[:, :, 0].copy()}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns]: d·c, exact in float32."""
        q, s, d = arrays["q"], arrays["s"], arrays["d"]
        place = np.repeat(s.astype(np.intp), self.shape.group, axis=1) * self.shape.levels + q
        codewords = codebooks_of(arrays, self.shape).reshape(-1)[place]
        return codewords.astype(np.float32) * np.repeat(e5m3.decode(d), BLOCK, axis=1)


BCQ2 = BcqPacker(shape_of("bcq2"))
BCQ4 = BCQ4_A4 = BcqPacker(shape_of("bcq4"))
