"""TSQ types: blocks of 64 weights, value d·(q - z), an unsigned 8-bit float d and an 8-bit fixed-point z.

Block layout (TSQ2, 18 bytes): byte 0 the E5M3 code of d, byte 1 the code of z, bytes 2 to 17 the codes: weight i of the
block stands in byte 2 + i % 16 at bits 2·(i // 16) and up, that is four planes of 16 weights. See docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
"""Weights per block, for all TSQ types."""

PLANE = 16
"""Weights of one bit plane: the bytes that hold the codes of a block."""


def decode_scale(code: NDArray[np.uint8]) -> NDArray[np.float32]:
    """E5M3 codes to float32 scales: 2^(e-24)·(1 + m/8), e the high five bits, m the low three. Any shape."""
    return ((code.astype(np.uint32) << 20) + np.uint32(103 << 23)).view(np.float32)


def decode_zero(code: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Zero-point codes to float32: steps of 2^bits/128 from -2^(bits-1). Any shape."""
    step = np.float32(2.0 ** (bits - 7))
    return code.astype(np.float32) * step - np.float32(2 ** (bits - 1))


def pack_tsq2(q: NDArray[np.uint8], d: NDArray[np.uint8], z: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make the bytes of TSQ2 rows.

    Args:
        q: codes 0…3, uint8 [rows, columns], columns a multiple of 64.
        d: E5M3 codes of the scales, uint8 [rows, columns / 64].
        z: codes of the zero-points, uint8 [rows, columns / 64].

    Returns:
        uint8 [rows, columns / 64 * 18].
    """
    rows, columns = q.shape
    planes = q.reshape(rows, columns // BLOCK, 4, PLANE)
    codes = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return np.concatenate([d[..., None], z[..., None], codes], axis=2).reshape(rows, -1)


def unpack_tsq2(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Invert `pack_tsq2`: bytes uint8 [rows, blocks * 18] to `(q, d, z)`."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 2 + PLANE)
    codes = blocks[:, :, 2:]
    q = np.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    return q.reshape(rows, -1), blocks[:, :, 0].copy(), blocks[:, :, 1].copy()


def dequantize(q: NDArray[np.uint8], d: NDArray[np.uint8], z: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Weights float32 [rows, columns]: d·(q - z) per block, in the order of operations of the C reference."""
    rows, columns = q.shape
    groups = q.reshape(rows, columns // BLOCK, BLOCK).astype(np.float32)
    return (decode_scale(d)[..., None] * (groups - decode_zero(z, bits)[..., None])).reshape(rows, columns)


_PACK = {2: (pack_tsq2, unpack_tsq2)}


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
        return _PACK[self.bits][0](q, d, z)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        q, d, z = _PACK[self.bits][1](data)
        return {"q": q, "d": d, "z": z}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns]."""
        return dequantize(arrays["q"], arrays["d"], arrays["z"], self.bits)
