"""Stock types of 4-bit floats: MXFP4, a power of two for every 32 weights; NVFP4, a small float for every 16.

A block is its scales, a byte each, then 4-bit floats of one exponent and sign (E2M1), in units of half their least
step: 0, 1, 2, 3, 4, 6, 8, 12 and the same with a minus. Codes count these from the lowest, with -0 below 0. Value
d·level, exact in float32.

MXFP4 has blocks of 32 weights, d = 2^(e - 128) (E8M0, halved for the units of levels). NVFP4 has blocks of 64 with four
scales, unsigned floats of 4 bits of exponent and 3 of mantissa (UE4M3), halved too. Its files may have a factor for a
whole tensor, or for each expert of a stack, in another tensor, `<name>.scale`: the array `factor` here, which has no
part in the bytes. Values are then (d·level)·factor. See docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types.facts import FACTOR
from tesseraq_gguf.types.stock.packer import Codes, check_codes, check_columns, join_nibbles, split_nibbles

FP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)
"""Levels by code."""

NO_E8M0, NO_UE4M3 = 255, 127
"""Codes that stand for no number, next to that of the largest scale."""


def _to_signs(q: Codes) -> Codes:
    """Codes in ascending order to sign, the highest of four bits, and magnitude."""
    return q ^ np.where(q & 8, np.uint8(8), np.uint8(15))


def _from_signs(q: Codes) -> Codes:
    return q ^ np.where(q & 8, np.uint8(15), np.uint8(8))


def decode_e8m0(e: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codes, of any shape, to half of the powers of two that they stand for."""
    return np.ldexp(np.float32(1), e.astype(np.int32) - 128).astype(np.float32)


def decode_ue4m3(code: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codes, of any shape, to half of the numbers that they stand for; the highest bit does not count, and 127 is 0."""
    exponent, mantissa = (code >> 3 & 15).astype(np.int32), (code & 7).astype(np.int32)
    normal = exponent > 0
    values = np.ldexp((mantissa + 8 * normal).astype(np.float32), np.maximum(exponent, 1) - 11)
    return np.where(code == NO_UE4M3, np.float32(0), values).astype(np.float32)


@dataclass(frozen=True)
class Fp4Packer:
    """Packer of MXFP4 or NVFP4.

    Its arrays: `q` uint8 [rows, columns], `d` uint8 [rows, columns / group]; and `factor` float32 [rows, 1] where the
    file has one, which `unpack` does not know.

    Attributes:
        type: name of the type.
        block: weights per block.
        group: weights that share a scale.
        largest: largest code of a scale that a file may have.
        decode: gives scales of their codes.
    """

    type: str
    block: int
    group: int
    largest: int
    decode: Callable[[NDArray[np.uint8]], NDArray[np.float32]]

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes].

        Raises:
            ValueError: wrong shapes or dtypes, or codes out of range.
        """
        q, d = arrays["q"], arrays["d"]
        rows, blocks = check_columns(self.type, q, self.block)
        groups = self.block // self.group
        check_codes(self.type, "q", q, q.shape, 15)
        check_codes(self.type, "d", d, (rows, blocks * groups), self.largest)
        nibbles = join_nibbles(_to_signs(q).reshape(rows, blocks, groups, self.group))
        return np.concatenate([d.reshape(rows, blocks, groups), nibbles.reshape(rows, blocks, -1)], 2).reshape(rows, -1)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        rows, groups = len(data), self.block // self.group
        blocks = data.reshape(rows, -1, groups + self.block // 2)
        q = split_nibbles(blocks[:, :, groups:].reshape(rows, -1, self.group // 2))
        return {"q": _from_signs(q).reshape(rows, -1), "d": blocks[:, :, :groups].reshape(rows, -1)}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns]: d·level, exact in float32, and times the factor if there is one."""
        levels = np.asarray(FP4_LEVELS, np.float32)[arrays["q"]]
        weights = levels * np.repeat(self.decode(arrays["d"]), self.group, axis=1)
        return weights * arrays[FACTOR] if FACTOR in arrays else weights


MXFP4 = Fp4Packer("mxfp4", 32, 32, NO_E8M0 - 1, decode_e8m0)
NVFP4 = Fp4Packer("nvfp4", 64, 16, 255, decode_ue4m3)


def of(type: str) -> Fp4Packer:
    """Return the packer of a type."""
    return {"mxfp4": MXFP4, "nvfp4": NVFP4}[type]
