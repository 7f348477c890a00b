"""PTQ1_61: blocks of 128 weights, the first 24 of 4 bits and the other 104 of one (PTQ1.61, arXiv 2502.13179).

A salient weight is s·(q - 7.5), q from 0 to 15; a binary one is d or -d. Byte 0 of a block is the E5M3 code of d, as in
TSQ types, byte 1 that of s; bytes 2 to 13 have the 24 codes in two planes: byte 2 + j has weight j in its low bits and
weight j + 12 in its high ones; bytes 14 to 26 are 104 bits, little-endian, bit i that of weight 24 + i: 1 means d. See
docs/formats.md.

Columns stand in the order of the file, which brings exactly 24 salient input channels into every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types import e5m3

BLOCK = 128
"""Weights per block."""

SALIENT = 24
"""Weights of a block that have 4 bits; they are the first."""

LEVELS = 16
BLOCK_BYTES = 27

SEARCH_BELOW = 8
"""E5M3 codes of s that `quantize` tries below the one that brings the largest weight to the largest code."""

SEARCH_ABOVE = 2
"""And above it."""


def quantize(x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> dict[str, NDArray[np.uint8]]:
    """Round to the nearest value, with the scales that `quantize_row_ptq1_61_ref` takes, bit for bit.

    d is the mean of the binary weights' magnitudes, weighted with their importance; s is the code, of some around the
    one that brings the largest weight to the largest code, with the least weighted squared error.

    Args:
        x: weights in the order of the file, float32 [rows, columns], columns a multiple of 128.
        importance: of each weight, float32 like x, 0 or more; None means that all are alike.

    Returns:
        The arrays of `Ptq161Packer`.
    """
    rows, columns = x.shape
    blocks = x.reshape(-1, BLOCK)
    w = np.ones_like(blocks) if importance is None else importance.reshape(-1, BLOCK).copy()
    for part in (slice(0, SALIENT), slice(SALIENT, BLOCK)):
        w[~(_sum(w[:, part].astype(np.float64)) > 0), part] = 1

    binary, weight = blocks[:, SALIENT:], w[:, SALIENT:].astype(np.float64)
    mean = _sum(weight * np.abs(binary)) / _sum(weight)
    d = e5m3.encode(mean.astype(np.float32))

    salient, weight = blocks[:, :SALIENT], w[:, :SALIENT].astype(np.float64)
    middle = e5m3.encode(np.abs(salient).max(axis=1) / np.float32(7.5)).astype(np.int64)
    s, codes, best = _round_salient(salient, weight, middle)
    for offset in (*range(-SEARCH_BELOW, 0), *range(1, SEARCH_ABOVE + 1)):
        code = middle + offset
        other, other_codes, error = _round_salient(salient, weight, np.clip(code, 0, 255))
        better = (error < best) & (code >= 0) & (code <= 255)
        s, best = np.where(better, other, s), np.where(better, error, best)
        codes = np.where(better[:, None], other_codes, codes)

    q = np.concatenate([codes, (binary >= 0).astype(np.uint8)], axis=1)
    shape = (rows, columns // BLOCK)
    return {"q": q.reshape(rows, columns), "d": d.reshape(shape), "s": s.reshape(shape)}


def _round_salient(
    x: NDArray[np.float32], weight: NDArray[np.float64], code: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Round salient weights [blocks, 24] with a scale code each [blocks]: this code, the codes q, squared errors."""
    scale = code.astype(np.uint8)
    s = e5m3.decode(scale).astype(np.float64)[:, None]
    q = np.clip(np.floor(x / s + 8.0), 0, LEVELS - 1)
    # a float, so that its product with a weight is exact in double precision, fused with the sum or not
    error = ((s * (q - 7.5) - x) ** 2).astype(np.float32)
    return scale, q.astype(np.uint8), _sum(weight * error)


def _sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum rows in their order, as a loop in C does: float64 [n, m] to [n]."""
    return np.cumsum(values, axis=1)[:, -1]


@dataclass(frozen=True)
class Ptq161Packer:
    """Packer of PTQ1_61.

    Its arrays, in the order of the file: `q` uint8 [rows, columns], in every block of 128 columns 24 codes below 16 and
    104 that are 0 or 1; `d` and `s`, E5M3 codes, uint8 [rows, columns / 128].
    """

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes]. Shapes and codes out of range are a ValueError."""
        q, d, s = arrays["q"], arrays["d"], arrays["s"]
        rows, columns = q.shape
        shape = (rows, columns // BLOCK)
        if columns % BLOCK or d.shape != shape or s.shape != shape:
            raise ValueError(f"PTQ1_61 arrays do not fit together: q {q.shape}, d {d.shape}, s {s.shape}")
        blocks = q.reshape(rows, -1, BLOCK)
        salient, binary = blocks[:, :, :SALIENT], blocks[:, :, SALIENT:]
        if q.size and (int(salient.max()) >= LEVELS or int(binary.max()) > 1):
            raise ValueError(f"a salient PTQ1_61 code is above {LEVELS - 1}, or a binary one above 1")
        planes = salient[:, :, : SALIENT // 2] | salient[:, :, SALIENT // 2 :] << np.uint8(4)
        signs = np.packbits(binary, axis=2, bitorder="little")
        return np.concatenate([d[..., None], s[..., None], planes, signs], axis=2).reshape(rows, -1)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        rows = data.shape[0]
        blocks = data.reshape(rows, -1, BLOCK_BYTES)
        planes = blocks[:, :, 2 : 2 + SALIENT // 2]
        signs = np.unpackbits(blocks[:, :, 2 + SALIENT // 2 :], axis=2, bitorder="little")
        q = np.concatenate([planes & np.uint8(15), planes >> np.uint8(4), signs], axis=2)
        return {"q": q.reshape(rows, -1), "d": blocks[:, :, 0].copy(), "s": blocks[:, :, 1].copy()}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns] in the order of the file: (s/2)·(2q - 15) and ±d, exact in float32."""
        q, d, s = arrays["q"], e5m3.decode(arrays["d"]), e5m3.decode(arrays["s"])
        codes = q.reshape(*d.shape, BLOCK).astype(np.float32)
        weights = np.empty(codes.shape, np.float32)
        weights[:, :, :SALIENT] = (s / 2)[..., None] * (2 * codes[:, :, :SALIENT] - 15)
        weights[:, :, SALIENT:] = np.where(codes[:, :, SALIENT:] > 0, d[..., None], -d[..., None])
        return weights.reshape(q.shape)


PTQ1_61 = Ptq161Packer()
