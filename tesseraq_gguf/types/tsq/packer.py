"""TSQ types: blocks of 64 weights, value d·(q - z), an unsigned 8-bit float d and an 8-bit fixed-point z.

Byte 0 of a block is the E5M3 code of d, byte 1 the code of z, then come the codes q in planes: with planes of b bits,
weight i has its bits in byte i % 8b, from bit b·(i // 8b) up. TSQ2 has planes of 2 bits and TSQ4 of 4; TSQ3 has planes
of 2 bits for the low bits of its codes and planes of 1 bit for the high ones. See docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types import e5m3

BLOCK = 64
"""Weights per block, for all TSQ types."""

WIDTHS = {2: (2,), 3: (2, 1), 4: (4,)}
"""Bits of the planes that codes of so many bits stand in, low bits first."""


def decode_zero(code: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Zero-point codes to float32: steps of 2^bits/128 from -2^(bits-1). Any shape."""
    step = np.float32(2.0 ** (bits - 7))
    return code.astype(np.float32) * step - np.float32(2 ** (bits - 1))


def pack(q: NDArray[np.uint8], d: NDArray[np.uint8], z: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Make the bytes of rows.

    Args:
        q: codes below 2^bits, uint8 [rows, columns], columns a multiple of 64.
        d: E5M3 codes of the scales, uint8 [rows, columns / 64].
        z: codes of the zero-points, uint8 [rows, columns / 64].
        bits: bits of a code.

    Returns:
        uint8 [rows, columns / 64 * (2 + 8 * bits)].
    """
    rows, columns = q.shape
    rest = q.reshape(rows, columns // BLOCK, BLOCK)
    planes = []
    for width in WIDTHS[bits]:
        planes.append(to_planes(rest & np.uint8((1 << width) - 1), width))
        rest = rest >> np.uint8(width)
    return np.concatenate([d[..., None], z[..., None], *planes], axis=2).reshape(rows, -1)


def unpack(data: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Invert `pack`: bytes uint8 [rows, blocks * (2 + 8 * bits)] to `(q, d, z)`."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 2 + 8 * bits)
    q = np.zeros((*blocks.shape[:2], BLOCK), np.uint8)
    start, shift = 2, 0
    for width in WIDTHS[bits]:
        q |= from_planes(blocks[:, :, start : start + 8 * width], width) << np.uint8(shift)
        start, shift = start + 8 * width, shift + width
    return q.reshape(rows, -1), blocks[:, :, 0].copy(), blocks[:, :, 1].copy()


def to_planes(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Put values below 2^width, [rows, blocks, 64], into planes: bytes [rows, blocks, 8 * width]."""
    planes = values.reshape(*values.shape[:2], 8 // width, 8 * width)
    return np.bitwise_or.reduce(planes << _shifts(width), axis=2)


def from_planes(planes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Invert `to_planes`."""
    values = planes[:, :, None] >> _shifts(width) & np.uint8((1 << width) - 1)
    return values.reshape(*planes.shape[:2], BLOCK)


def _shifts(width: int) -> NDArray[np.uint8]:
    """Lowest bit of each plane in its byte, as a column: uint8 [8 / width, 1]."""
    return np.arange(0, 8, width, dtype=np.uint8)[:, None]


def dequantize(q: NDArray[np.uint8], d: NDArray[np.uint8], z: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Weights float32 [rows, columns]: d·(q - z) per block, in the order of operations of the C reference."""
    rows, columns = q.shape
    groups = q.reshape(rows, columns // BLOCK, BLOCK).astype(np.float32)
    return (e5m3.decode(d)[..., None] * (groups - decode_zero(z, bits)[..., None])).reshape(rows, columns)


@dataclass(frozen=True)
class TsqPacker:
    """Packer of the TSQ type with `bits`-bit codes.

    Its arrays: `q` uint8 [rows, columns], `d` and `z` uint8 [rows, columns / 64].

    Attributes:
        bits: bits of a code.
    """

    bits: int

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes]. Shapes and codes out of range are a ValueError."""
        q, d, z = arrays["q"], arrays["d"], arrays["z"]
        rows, columns = q.shape
        blocks = (rows, columns // BLOCK)
        if columns % BLOCK or d.shape != blocks or z.shape != blocks:
            raise ValueError(f"TSQ arrays do not fit together: q {q.shape}, d {d.shape}, z {z.shape}")
        if q.size and int(q.max()) >> self.bits:
            raise ValueError(f"a TSQ{self.bits} code is above {(1 << self.bits) - 1}")
        return pack(q, d, z, self.bits)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        q, d, z = unpack(data, self.bits)
        return {"q": q, "d": d, "z": z}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns]."""
        return dequantize(arrays["q"], arrays["d"], arrays["z"], self.bits)


TSQ2, TSQ3, TSQ4 = map(TsqPacker, (2, 3, 4))
