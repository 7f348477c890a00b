"""Lattice types: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, super-blocks of 256 weights in groups of 16 or 32.

Four or eight neighbouring weights are one of 256 to 1024 points, magnitudes of a few odd steps, each with a sign. A
group's scale is d·(2·sc + 1)·unit: `d` is a half float of the super-block, `sc` an integer of 4 bits. No bit is left
over. Where signs have 7 bits for eight weights, an even number of the eight is negative.

Everywhere but in the bytes, a code is the weight's own signed level: points are few enough to be found again by what
they are. A level times a scale has at most 22 significant bits, so float32 holds every weight exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

_STEPS = 15
"""Largest `sc`."""


def points_of(type: str) -> NDArray[np.int8]:
    """Magnitudes of a type's points, int8 [points, weights], as gguf-py lists them."""
    theirs = getattr(gguf.quants, type.upper())
    theirs.init_grid()
    return theirs.grid.reshape(theirs.grid_shape).astype(np.int8)  # type: ignore[no-any-return]


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


@dataclass(frozen=True)
class LatticePacker:
    """Packer of one lattice type.

    Its arrays: signed levels `q` int8 [rows, columns]; `sc` uint8 [rows, columns / group] and `d` float16 [rows,
    columns / 256].

    Attributes:
        type: name of the type.
        group: weights per group.
        unit: what a group's scale is multiplied by.
        even: whether an even number of eight neighbours is negative.
        layout: the fields of a super-block behind `d`, in order, with their bytes.
        join: indices of `points` [rows, blocks, 256 / weights of a point], `signs` as bytes [rows, blocks, 32] and `sc`
            [rows, blocks, 256 / group] to fields [rows, blocks, bytes].
        split: inverts `join`; of even signs, the eighth may be missing.
    """

    type: str
    group: int
    unit: float
    even: bool
    layout: Mapping[str, int]
    join: Callable[[Fields], Fields]
    split: Callable[[Fields], Fields]

    @cached_property
    def points(self) -> NDArray[np.int8]:
        """Magnitudes of the points, int8 [points, weights]."""
        return points_of(self.type)

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        """Rank of a magnitude among those of the type, by magnitude; what is none of them has one above all ranks."""
        levels = np.unique(self.points)
        ranks = np.full(129, len(levels))
        ranks[levels] = np.arange(len(levels))
        return ranks

    def _keys(self, magnitudes: NDArray[Any]) -> NDArray[np.int64]:
        """One number for the weights of each point: [..., weights] to [...]."""
        places = (self._ranks.max() + 1) ** np.arange(self.points.shape[1])
        return (self._ranks[magnitudes] * places).sum(-1)

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
        check_codes(self.type, "sc", arrays["sc"], (rows, blocks * SUPER_BLOCK // self.group), _STEPS)
        check_halves(self.type, "d", arrays["d"], (rows, blocks))
        codes = {"points": self._points(q), "signs": self._signs(q), "sc": arrays["sc"]}
        fields = self.join({key: a.reshape(rows, blocks, -1) for key, a in codes.items()})
        parts = [half_bytes(arrays["d"]), *(fields[name] for name in self.layout)]
        return np.concatenate(parts, axis=2).reshape(rows, -1)

    def _points(self, q: NDArray[np.int8]) -> NDArray[np.uint16]:
        """Indices of the points of levels [rows, columns], uint16 [rows, columns / weights]."""
        magnitudes = np.abs(q.astype(np.int16)).reshape(len(q), -1, self.points.shape[1])
        found = self._index[self._keys(magnitudes)]
        if (found < 0).any():
            raise ValueError(f"{self.type} has no point {magnitudes[found < 0][0].tolist()}")
        return found.astype(np.uint16)

    def _signs(self, q: NDArray[np.int8]) -> Codes:
        """A byte for the signs of every eight levels, the first in the lowest bit: uint8 [rows, columns / 8]."""
        negative = (q < 0).reshape(len(q), -1, SIGNED)
        if self.even and (negative.sum(-1) % 2).any():
            raise ValueError(f"{self.type} has an even number of negative weights among eight")
        return np.packbits(negative, axis=-1, bitorder="little")[..., 0]

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        blocks = data.reshape(len(data), -1, 2 + sum(self.layout.values()))
        first, *parts = np.split(blocks, np.cumsum([2, *self.layout.values()])[:-1], axis=2)
        codes = self.split(dict(zip(self.layout, parts, strict=True)))
        negative = np.unpackbits(codes["signs"][..., None], axis=-1, bitorder="little")
        if self.even:
            negative[..., 7] = negative[..., :7].sum(-1) % 2
        levels = self.points[codes["points"]].reshape(negative.shape)
        q = np.where(negative, -levels, levels).reshape(len(data), -1)
        return {"q": q, "sc": codes["sc"].reshape(len(data), -1), "d": halves(first)}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns], exactly."""
        d = np.repeat(arrays["d"].astype(np.float32), SUPER_BLOCK // self.group, axis=1)
        scale = d * ((2 * arrays["sc"] + 1) * np.float32(self.unit))
        return arrays["q"].astype(np.float32) * np.repeat(scale, self.group, axis=1)


IQ2_XXS = LatticePacker("iq2_xxs", 32, 1 / 8, True, {"words": 64}, _join_iq2_xxs, _split_iq2_xxs)
IQ2_XS = LatticePacker("iq2_xs", 16, 1 / 8, True, {"words": 64, "scales": 8}, _join_iq2_xs, _split_iq2_xs)
IQ2_S = LatticePacker(
    "iq2_s", 16, 1 / 8, False, {"low": 32, "signs": 32, "high": 8, "scales": 8}, _join_iq2_s, _split_iq2_s
)
IQ3_XXS = LatticePacker("iq3_xxs", 32, 1 / 4, True, {"low": 64, "words": 32}, _join_iq3_xxs, _split_iq3_xxs)
IQ3_S = LatticePacker(
    "iq3_s", 32, 1.0, False, {"low": 64, "high": 8, "signs": 32, "scales": 4}, _join_iq3_s, _split_iq3_s
)
