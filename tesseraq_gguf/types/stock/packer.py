"""Stock block types: Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, blocks of 32, 64 or 128 weights, parameters
in half precision.

A block is its parameters, two bytes each, then the bytes of its codes. Value d·level, where codes count the levels
from the lowest, or d·q + m (Q4_1, Q5_1). No bit is left over: every pattern of bytes is somebody's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[Any]
"""Integers of a few bits, or bytes with such in them: uint8, which numpy's type hints lose in `q >> 4`."""


def half_bytes(values: NDArray[np.float16]) -> NDArray[np.uint8]:
    """The bytes of float16 values as the file has them, little-endian: [rows, blocks] to uint8 [rows, blocks, 2]."""
    return np.ascontiguousarray(values[..., None], dtype="<f2").view(np.uint8)


def halves(data: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Invert `half_bytes`."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float16)


def check_codes(type: str, name: str, codes: NDArray[Any], shape: tuple[int, ...], top: int) -> None:
    """Raise ValueError unless an array of codes is uint8, of this shape and nowhere above `top`."""
    if codes.dtype != np.uint8 or codes.shape != shape:
        raise ValueError(f"{type} wants {name} as uint8 {list(shape)}, not {codes.dtype} {list(codes.shape)}")
    if codes.size and int(codes.max()) > top:
        raise ValueError(f"{type} has {name} up to {top}, not {codes.max()}")


def check_halves(type: str, name: str, values: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an array of parameters is float16, of this shape and finite.

    llama.cpp takes a block whose parameters are not finite for a damaged one.
    """
    if values.dtype != np.float16 or values.shape != shape:
        raise ValueError(f"{type} wants {name} as float16 {list(shape)}, not {values.dtype} {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{type} has a {name} that is not finite")


def check_columns(type: str, q: NDArray[Any], block: int) -> tuple[int, int]:
    """Return rows and blocks per row of a matrix of codes. ValueError unless its rows are whole blocks."""
    if q.ndim != 2 or q.shape[1] % block:
        raise ValueError(f"{type} wants q as [rows, columns] with columns a multiple of {block}, not {list(q.shape)}")
    return q.shape[0], q.shape[1] // block


def join_nibbles(q: Codes) -> Codes:
    """Four-bit codes [..., 2·n] to bytes [..., n]: the first half in the low bits, the second in the high ones."""
    low, high = np.split(q, 2, axis=-1)
    return low | high << 4


def split_nibbles(data: Codes) -> Codes:
    """Invert `join_nibbles`."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def join_quarters(q: Codes) -> Codes:
    """Two-bit codes [..., 4, n] to bytes [..., n], the first of the four in the lowest bits."""
    return q[..., 0, :] | q[..., 1, :] << 2 | q[..., 2, :] << 4 | q[..., 3, :] << 6


def split_quarters(data: Codes) -> Codes:
    """Invert `join_quarters`."""
    return np.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)


def _join_neighbours(q: Codes) -> Codes:
    """Two-bit codes [..., 4·n] to bytes [..., n]: four neighbours in a byte, the first in the lowest bits."""
    return join_quarters(q.reshape(*q.shape[:-1], -1, 4).swapaxes(-1, -2))


def _split_neighbours(data: Codes) -> Codes:
    return split_quarters(data).swapaxes(-1, -2).reshape(*data.shape[:-1], -1)


def _join_five_bits(q: Codes) -> Codes:
    """Five-bit codes [..., 32] to bytes [..., 20]: all fifth bits, weight 0 in the lowest of byte 0, then nibbles."""
    high = np.packbits(q >> 4, axis=-1, bitorder="little")
    return np.concatenate([high, join_nibbles(q & 15)], axis=-1)


def _split_five_bits(data: Codes) -> Codes:
    high = np.unpackbits(data[..., :4], axis=-1, bitorder="little")
    return split_nibbles(data[..., 4:]) | high << 4


def _join_bits(q: Codes) -> Codes:
    """One-bit codes [..., 8·n] to bytes [..., n], the first in the lowest bit."""
    return np.packbits(q, axis=-1, bitorder="little")


def _split_bits(data: Codes) -> Codes:
    return np.unpackbits(data, axis=-1, bitorder="little")


def flip_sign(q: Codes) -> Codes:
    """Codes to the bytes of int8, q - 128 in two's complement, and back."""
    return q ^ 0x80


@dataclass(frozen=True)
class BlockPacker:
    """Packer of one stock block type.

    Its arrays: `q` uint8 [rows, columns], `d` and, where there are no `levels`, `m` float16 [rows, columns / block].

    Attributes:
        type: name of the type.
        block: weights per block.
        bits: bits of a code.
        levels: what d multiplies, a whole number for every code; None if a code counts from the block's own minimum m.
        join: codes of blocks, uint8 [rows, blocks, block], to their bytes.
        split: inverts `join`.
    """

    type: str
    block: int
    bits: int
    levels: Sequence[int] | None
    join: Callable[[Codes], Codes]
    split: Callable[[Codes], Codes]

    @property
    def _parameters(self) -> tuple[str, ...]:
        return ("d",) if self.levels is not None else ("d", "m")

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes].

        Raises:
            ValueError: wrong shapes or dtypes, codes out of range, or parameters that are not finite.
        """
        q = arrays["q"]
        rows, blocks = check_columns(self.type, q, self.block)
        check_codes(self.type, "q", q, q.shape, (1 << self.bits) - 1)
        for name in self._parameters:
            check_halves(self.type, name, arrays[name], (rows, blocks))
        parameters = [half_bytes(arrays[name]) for name in self._parameters]
        codes = self.join(q.reshape(rows, blocks, self.block))
        return np.concatenate([*parameters, codes], axis=2).reshape(rows, -1)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        start = 2 * len(self._parameters)
        blocks = data.reshape(len(data), -1, start + self.block * self.bits // 8)
        arrays: dict[str, NDArray[Any]] = {"q": self.split(blocks[:, :, start:]).reshape(len(data), -1)}
        for i, name in enumerate(self._parameters):
            arrays[name] = halves(blocks[:, :, 2 * i : 2 * i + 2])
        return arrays

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns], in the order of operations of the C reference."""
        rows, columns = arrays["q"].shape
        q = arrays["q"].reshape(rows, columns // self.block, self.block)
        d = arrays["d"].astype(np.float32)[..., None]
        if self.levels is not None:
            weights = np.asarray(self.levels, np.float32)[q] * d
        else:
            weights = q.astype(np.float32) * d + arrays["m"].astype(np.float32)[..., None]
        return weights.reshape(rows, columns)


IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Levels of IQ4_NL and IQ4_XS."""

Q1_0 = BlockPacker("q1_0", 128, 1, (-1, 1), _join_bits, _split_bits)
Q2_0 = BlockPacker("q2_0", 64, 2, range(-1, 3), _join_neighbours, _split_neighbours)
Q4_0 = BlockPacker("q4_0", 32, 4, range(-8, 8), join_nibbles, split_nibbles)
Q4_1 = BlockPacker("q4_1", 32, 4, None, join_nibbles, split_nibbles)
Q5_0 = BlockPacker("q5_0", 32, 5, range(-16, 16), _join_five_bits, _split_five_bits)
Q5_1 = BlockPacker("q5_1", 32, 5, None, _join_five_bits, _split_five_bits)
Q8_0 = BlockPacker("q8_0", 32, 8, range(-128, 128), flip_sign, flip_sign)
IQ4_NL = BlockPacker("iq4_nl", 32, 4, IQ4_LEVELS, join_nibbles, split_nibbles)
