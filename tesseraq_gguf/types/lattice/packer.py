"""Lattice types: IQ1_S, IQ1_M, IQ2_XXS … IQ3_S, super-blocks of 256 weights in groups of 16 or 32.

Four or eight neighbouring weights are one of 256 to 1024 points, magnitudes of a few odd steps, each with a sign. A
group's scale is d·(2·sc + 1)·unit: `d` is a half float of the super-block, `sc` an integer of 3 or 4 bits. No bit is
left over. Where signs have 7 bits for eight weights, an even number of the eight is negative.

Points of the IQ1 types are 2048 of the vectors of -1, 0 and 1, and all eight weights of one are an eighth higher or
lower: in IQ1_M the bit for that belongs to the point, in IQ1_S it is the group's.

Everywhere but in the bytes, a code is the weight's own signed level: points are few enough to be found again by what
they are. A level times a scale has at most 22 significant bits, so float32 holds every weight exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types.kquants.packer import SUPER_BLOCK, Fields
from tesseraq_gguf.types.stock.packer import (
    Codes,
    check_codes,
    check_columns,
    check_halves,
    half_bytes,
    halves,
    join_quarters,
    split_quarters,
)

SIGNED = 8
"""Weights whose signs stand together."""


class Signs(Enum):
    """Signs of the weights of a point."""

    FREE = "each weight has its own"
    EVEN = "an even number of eight neighbours is negative"
    INSIDE = "points have them already"


def points_of(type: str) -> NDArray[np.int8]:
    """Points of a type, int8 [points, weights], as gguf-py lists them."""
    theirs = getattr(gguf.quants, type.upper())
    theirs.init_grid()
    return theirs.grid.reshape(theirs.grid_shape).astype(np.int8)  # type: ignore[no-any-return]


def _higher_and_lower(type: str) -> NDArray[np.int8]:
    """Points of a type in eighths, all an eighth higher, and behind them all an eighth lower."""
    eighths = 8 * points_of(type)
    return np.concatenate([eighths + 1, eighths - 1]).astype(np.int8)


def _bytes_of(words: Codes) -> Codes:
    """Words [..., n] to their bytes, little-endian."""
    return np.ascontiguousarray(words.astype(words.dtype.newbyteorder("<"))).view(np.uint8)


def _words_of(data: Codes, dtype: type[np.unsignedinteger[Any]]) -> Codes:
    return np.ascontiguousarray(data).view(np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _join_pairs(q: Codes) -> Codes:
    """Four-bit codes [..., 2·n] to bytes [..., n]: two neighbours in a byte, the first in the low bits."""
    return q[..., ::2] | q[..., 1::2] << 4


def _split_pairs(data: Codes) -> Codes:
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


_SEVENS = np.array([0, 7, 14, 21], np.uint32)
"""Lowest bit of each of four signs of 7 bits in a word; the scale is above them."""


def _join_signs_and_scales(codes: Fields) -> Codes:
    """Signs [..., 32] and scales [..., 8] to 8 words."""
    signs = (codes["signs"] & 127).reshape(*codes["signs"].shape[:-1], -1, 4).astype(np.uint32)
    return (signs << _SEVENS).sum(-1, dtype=np.uint32) | codes["sc"].astype(np.uint32) << np.uint32(28)


def _split_signs_and_scales(words: Codes) -> Fields:
    signs = (words[..., None] >> _SEVENS & np.uint32(127)).astype(np.uint8)
    return {"signs": signs.reshape(*words.shape[:-1], -1), "sc": (words >> np.uint32(28)).astype(np.uint8)}


def _join_iq2_xxs(codes: Fields) -> Fields:
    points = codes["points"].astype(np.uint8).reshape(*codes["points"].shape[:-1], 8, 4)
    words = _bytes_of(_join_signs_and_scales(codes)[..., None])
    return {"words": np.concatenate([points, words], axis=-1).reshape(*points.shape[:-2], 64)}


def _split_iq2_xxs(fields: Fields) -> Fields:
    words = fields["words"].reshape(*fields["words"].shape[:-1], 8, 8)
    points = words[..., :4].reshape(*words.shape[:-2], 32)
    return {"points": points} | _split_signs_and_scales(_words_of(words[..., 4:], np.uint32)[..., 0])


def _join_iq2_xs(codes: Fields) -> Fields:
    words = codes["points"].astype(np.uint16) | (codes["signs"] & 127).astype(np.uint16) << np.uint16(9)
    return {"words": _bytes_of(words), "scales": _join_pairs(codes["sc"])}


def _split_iq2_xs(fields: Fields) -> Fields:
    words = _words_of(fields["words"], np.uint16)
    signs = (words >> np.uint16(9)).astype(np.uint8)
    return {"points": words & np.uint16(511), "signs": signs, "sc": _split_pairs(fields["scales"])}


def _join_iq2_s(codes: Fields) -> Fields:
    points = codes["points"]
    high = (points >> 8).astype(np.uint8).reshape(*points.shape[:-1], 8, 4)
    return {
        "low": (points & 255).astype(np.uint8),
        "signs": codes["signs"],
        "high": join_quarters(high.swapaxes(-1, -2)),
        "scales": _join_pairs(codes["sc"]),
    }


def _split_iq2_s(fields: Fields) -> Fields:
    high = split_quarters(fields["high"]).swapaxes(-1, -2).reshape(fields["low"].shape)
    points = fields["low"] | high.astype(np.uint16) << np.uint16(8)
    return {"points": points, "signs": fields["signs"], "sc": _split_pairs(fields["scales"])}


def _join_iq3_xxs(codes: Fields) -> Fields:
    return {"low": codes["points"].astype(np.uint8), "words": _bytes_of(_join_signs_and_scales(codes))}


def _split_iq3_xxs(fields: Fields) -> Fields:
    return {"points": fields["low"]} | _split_signs_and_scales(_words_of(fields["words"], np.uint32))


def _join_iq3_s(codes: Fields) -> Fields:
    points = codes["points"]
    return {
        "low": (points & 255).astype(np.uint8),
        "high": np.packbits((points >> 8).astype(np.uint8), axis=-1, bitorder="little"),
        "signs": codes["signs"],
        "scales": _join_pairs(codes["sc"]),
    }


def _split_iq3_s(fields: Fields) -> Fields:
    high = np.unpackbits(fields["high"], axis=-1, bitorder="little")
    points = fields["low"] | high.astype(np.uint16) << np.uint16(8)
    return {"points": points, "signs": fields["signs"], "sc": _split_pairs(fields["scales"])}


_THREES = np.array([0, 3, 6, 9], np.uint16)
"""Lowest bit of each of four codes of 3 bits in a word; four bits are left above them."""

_NIBBLES = np.array([0, 4, 8, 12], np.uint16)
"""Lowest bit of each of four parts of a half float."""


def _join_threes(codes: Codes, top: Codes) -> Codes:
    """Codes of 3 bits [..., 4·n] and what is above four of them, of 4 bits [..., n], to bytes [..., 2·n]."""
    fours = codes.reshape(*codes.shape[:-1], -1, 4).astype(np.uint16)
    return _bytes_of((fours << _THREES).sum(-1, dtype=np.uint16) | top.astype(np.uint16) << np.uint16(12))


def _split_threes(data: Codes) -> tuple[Codes, Codes]:
    words = _words_of(data, np.uint16)
    codes = words[..., None] >> _THREES & np.uint16(7)
    return codes.reshape(*words.shape[:-1], -1).astype(np.uint8), (words >> np.uint16(12)).astype(np.uint8)


def _join_iq1_m(codes: Fields) -> Fields:
    """The half float has no place of its own: its nibbles stand above the scales."""
    d = _words_of(codes["d"], np.uint16) >> _NIBBLES & np.uint16(15)
    points = codes["points"]
    return {
        "low": (points & 255).astype(np.uint8),
        "high": _join_pairs((points >> 8).astype(np.uint8)),
        "scales": _join_threes(codes["sc"], d),
    }


def _split_iq1_m(fields: Fields) -> Fields:
    sc, d = _split_threes(fields["scales"])
    high = _split_pairs(fields["high"]).astype(np.uint16)
    half = (d.astype(np.uint16) << _NIBBLES).sum(-1, keepdims=True, dtype=np.uint16)
    return {"points": fields["low"] | high << np.uint16(8), "sc": sc, "d": _bytes_of(half)}


def _join_iq1_s(codes: Fields) -> Fields:
    points = codes["points"]
    top = codes["sc"] | codes["lower"] << 3
    return {"low": (points & 255).astype(np.uint8), "words": _join_threes(points >> np.uint16(8), top)}


def _split_iq1_s(fields: Fields) -> Fields:
    high, top = _split_threes(fields["words"])
    points = fields["low"] | high.astype(np.uint16) << np.uint16(8)
    return {"points": points, "sc": top & 7, "lower": top >> 3}


@dataclass(frozen=True)
class LatticePacker:
    """Packer of one lattice type.

    Its arrays: signed levels `q` int8 [rows, columns]; `sc` uint8 [rows, columns / group] and `d` float16 [rows,
    columns / 256]; where groups have a shift, `lower` uint8 as `sc`: whether it is downwards.

    Attributes:
        type: name of the type.
        group: weights per group.
        unit: what a group's scale is multiplied by.
        signs: what signs the weights of a point have.
        layout: the fields of a super-block, in order, with their bytes. Field `d` is the half float's, the others are
            what `join` makes.
        join: indices of `points` [rows, blocks, 256 / weights of a point], `signs` as bytes [rows, blocks, 32] unless
            points have them, `sc` and `lower` [rows, blocks, 256 / group] and the bytes of `d` to fields [rows, blocks,
            bytes].
        split: inverts `join`; of even signs, the eighth may be missing.
        scale_bits: bits of `sc`.
        table: gives the points of a type.
        shift: what the levels of a group are higher by, or lower; 0 where they are as they are.
    """

    type: str
    group: int
    unit: float
    signs: Signs
    layout: Mapping[str, int]
    join: Callable[[Fields], Fields]
    split: Callable[[Fields], Fields]
    scale_bits: int = 4
    table: Callable[[str], NDArray[np.int8]] = points_of
    shift: float = 0.0

    @property
    def _of_groups(self) -> dict[str, int]:
        """What groups have, and the largest that it can be."""
        return {"sc": self.steps} | ({"lower": 1} if self.shift else {})

    @property
    def steps(self) -> int:
        """Largest `sc`."""
        return (1 << self.scale_bits) - 1

    @cached_property
    def points(self) -> NDArray[np.int8]:
        """Magnitudes of the points, or their levels where they have signs, int8 [points, weights]."""
        return self.table(self.type)

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        """Rank of a number among those that points have, by the number; all others have one above all ranks.

        Numbers are from -128 to 128, and negative ones are counted from the end.
        """
        levels = np.unique(self.points)
        ranks = np.full(257, len(levels))
        ranks[levels] = np.arange(len(levels))
        return ranks

    def _keys(self, points: NDArray[Any]) -> NDArray[np.int64]:
        """One number for the weights of each point: [..., weights] to [...]."""
        places = (self._ranks.max() + 1) ** np.arange(self.points.shape[1])
        return (self._ranks[points] * places).sum(-1)

    @cached_property
    def _index(self) -> NDArray[np.int16]:
        """Indices of points by their keys; -1 where there is no point."""
        index = np.full((self._ranks.max() + 1) ** self.points.shape[1], -1, np.int16)
        index[self._keys(self.points)] = np.arange(len(self.points))
        return index

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes].

        Raises:
            ValueError: wrong shapes or dtypes, levels that are no points, or parameters that are not finite.
        """
        q = arrays["q"]
        rows, blocks = check_columns(self.type, q, SUPER_BLOCK)
        if q.dtype != np.int8:
            raise ValueError(f"{self.type} wants q as int8, not {q.dtype}")
        check_halves(self.type, "d", arrays["d"], (rows, blocks))
        codes: Fields = {"points": self._points(q), "d": half_bytes(arrays["d"])}
        for name, top in self._of_groups.items():
            check_codes(self.type, name, arrays[name], (rows, blocks * SUPER_BLOCK // self.group), top)
            codes[name] = arrays[name]
        if self.signs is not Signs.INSIDE:
            codes["signs"] = self._signs(q)
        codes = {key: a.reshape(rows, blocks, -1) for key, a in codes.items()}
        fields = codes | self.join(codes)
        return np.concatenate([fields[name] for name in self.layout], axis=2).reshape(rows, -1)

    def _points(self, q: NDArray[np.int8]) -> NDArray[np.uint16]:
        """Indices of the points of levels [rows, columns], uint16 [rows, columns / weights]."""
        levels = q if self.signs is Signs.INSIDE else np.abs(q.astype(np.int16))
        points = levels.reshape(len(q), -1, self.points.shape[1])
        found = self._index[self._keys(points)]
        if (found < 0).any():
            raise ValueError(f"{self.type} has no point {points[found < 0][0].tolist()}")
        return found.astype(np.uint16)

    def _signs(self, q: NDArray[np.int8]) -> Codes:
        """A byte for the signs of every eight levels, the first in the lowest bit: uint8 [rows, columns / 8]."""
        negative = (q < 0).reshape(len(q), -1, SIGNED)
        if self.signs is Signs.EVEN and (negative.sum(-1) % 2).any():
            raise ValueError(f"{self.type} has an even number of negative weights among eight")
        return np.packbits(negative, axis=-1, bitorder="little")[..., 0]

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        blocks = data.reshape(len(data), -1, sum(self.layout.values()))
        parts = np.split(blocks, np.cumsum([*self.layout.values()])[:-1], axis=2)
        fields = dict(zip(self.layout, parts, strict=True))
        codes = fields | self.split(fields)
        levels = self.points[codes["points"]].reshape(len(data), -1)
        if self.signs is not Signs.INSIDE:
            levels = np.where(self._negative(codes["signs"]).reshape(levels.shape), -levels, levels)
        of_groups = {name: codes[name].reshape(len(data), -1) for name in self._of_groups}
        return {"q": levels, "d": halves(codes["d"]), **of_groups}

    def _negative(self, signs: Codes) -> NDArray[np.uint8]:
        """Whether weights are negative, [..., 8], of the bytes [...] of their signs."""
        negative = np.unpackbits(signs[..., None], axis=-1, bitorder="little")
        if self.signs is Signs.EVEN:
            negative[..., 7] = negative[..., :7].sum(-1) % 2
        return negative

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns], exactly."""
        d = np.repeat(arrays["d"].astype(np.float32), SUPER_BLOCK // self.group, axis=1)
        scale = d * ((2 * arrays["sc"] + 1) * np.float32(self.unit))
        levels = arrays["q"].astype(np.float32)
        if self.shift:
            levels += np.repeat(
                np.float32(self.shift) * (1 - 2 * arrays["lower"].astype(np.float32)), self.group, axis=1
            )
        return levels * np.repeat(scale, self.group, axis=1)


IQ1_S = LatticePacker(
    "iq1_s", 32, 1.0, Signs.INSIDE, {"d": 2, "low": 32, "words": 16}, _join_iq1_s, _split_iq1_s,
    scale_bits=3, shift=1 / 8,
)  # fmt: skip
IQ1_M = LatticePacker(
    "iq1_m", 16, 1 / 8, Signs.INSIDE, {"low": 32, "high": 16, "scales": 8}, _join_iq1_m, _split_iq1_m,
    scale_bits=3, table=_higher_and_lower,
)  # fmt: skip
IQ2_XXS = LatticePacker("iq2_xxs", 32, 1 / 8, Signs.EVEN, {"d": 2, "words": 64}, _join_iq2_xxs, _split_iq2_xxs)
IQ2_XS = LatticePacker("iq2_xs", 16, 1 / 8, Signs.EVEN, {"d": 2, "words": 64, "scales": 8}, _join_iq2_xs, _split_iq2_xs)
IQ2_S = LatticePacker(
    "iq2_s", 16, 1 / 8, Signs.FREE, {"d": 2, "low": 32, "signs": 32, "high": 8, "scales": 8}, _join_iq2_s, _split_iq2_s
)
IQ3_XXS = LatticePacker(
    "iq3_xxs", 32, 1 / 4, Signs.EVEN, {"d": 2, "low": 64, "words": 32}, _join_iq3_xxs, _split_iq3_xxs
)
IQ3_S = LatticePacker(
    "iq3_s", 32, 1.0, Signs.FREE, {"d": 2, "low": 64, "high": 8, "signs": 32, "scales": 4}, _join_iq3_s, _split_iq3_s
)
