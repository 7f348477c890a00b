"""Stock super-block types: Q2_K … Q6_K and IQ4_XS, 256 weights in groups of 16 or 32 whose scales are integers too.

A group's scale is d·sc, its minimum dmin·m: `d` and `dmin` are half-precision floats of the super-block, `sc` and `m`
integers of 4 to 8 bits. Value d·sc·q - dmin·m (Q2_K, Q4_K, Q5_K), or d·(sc - 32)·(q - 4) (Q3_K), d·(sc - 128)·(q - 32)
(Q6_K) and d·(sc - 32)·level (IQ4_XS). No bit is left over.

Products with d have at most 24 significant bits and dmin·m 17: float32 holds all exactly, only the subtraction rounds.
So a compiler may fuse it with the product, as some do, and the weights are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types.stock.packer import (
    IQ4_LEVELS,
    Codes,
    check_codes,
    check_columns,
    check_halves,
    flip_sign,
    half_bytes,
    halves,
    join_nibbles,
    join_quarters,
    split_nibbles,
    split_quarters,
)

SUPER_BLOCK = 256
"""Weights per super-block, for all K types."""


def _join_planes(q: Codes) -> Codes:
    """Two-bit codes [..., 256] to 64 bytes: each half of the super-block is four planes of 32 weights, lowest first."""
    return join_quarters(q.reshape(*q.shape[:-1], 2, 4, 32)).reshape(*q.shape[:-1], 64)


def _split_planes(data: Codes) -> Codes:
    return split_quarters(data.reshape(*data.shape[:-1], 2, 32)).reshape(*data.shape[:-1], SUPER_BLOCK)


def _join_high_bits(q: Codes) -> Codes:
    """Bits [..., 256] to 32 bytes: bit p of byte l is that of weight 32·p + l."""
    planes = q.reshape(*q.shape[:-1], 8, 32)
    return np.packbits(planes, axis=-2, bitorder="little")[..., 0, :]


def _split_high_bits(data: Codes) -> Codes:
    return np.unpackbits(data[..., None, :], axis=-2, bitorder="little").reshape(*data.shape[:-1], SUPER_BLOCK)


def _join_six_bits(sc: Codes) -> Codes:
    """Sixteen six-bit scales to 12 bytes.

    Byte s of the first eight has the low nibbles of the scales s and s + 8; byte 8 + s has the two high bits of s,
    s + 4, s + 8 and s + 12.
    """
    high = join_quarters((sc >> 4).reshape(*sc.shape[:-1], 4, 4))
    return np.concatenate([join_nibbles(sc & 15), high], axis=-1)


def _split_six_bits(data: Codes) -> Codes:
    high = split_quarters(data[..., 8:]).reshape(*data.shape[:-1], 16)
    return split_nibbles(data[..., :8]) | high << 4


def _join_scales_and_minima(sc: Codes, m: Codes) -> Codes:
    """Eight six-bit scales and minima to 12 bytes.

    The first four scales and the first four minima stand in the low six bits of bytes 0 to 7; of the other four, low
    nibbles share bytes 8 to 11, scale first, and the high two bits top the bytes of the scale or minimum four before.
    """
    low_sc, high_sc = np.split(sc, 2, axis=-1)
    low_m, high_m = np.split(m, 2, axis=-1)
    return np.concatenate([low_sc | high_sc >> 4 << 6, low_m | high_m >> 4 << 6, high_sc & 15 | high_m << 4], axis=-1)


def _split_scales_and_minima(data: Codes) -> tuple[Codes, Codes]:
    first, second, nibbles = np.split(data, 3, axis=-1)
    sc = np.concatenate([first & 63, nibbles & 15 | first >> 6 << 4], axis=-1)
    m = np.concatenate([second & 63, nibbles >> 4 | second >> 6 << 4], axis=-1)
    return sc, m


Fields = dict[str, Codes]
"""Codes of super-blocks, or their bytes, by name: each [rows, blocks, …]."""


def _join_q2_k(codes: Fields) -> Fields:
    return {"scales": codes["sc"] | codes["m"] << 4, "low": _join_planes(codes["q"])}


def _split_q2_k(fields: Fields) -> Fields:
    return {"q": _split_planes(fields["low"]), "sc": fields["scales"] & 15, "m": fields["scales"] >> 4}


def _join_q3_k(codes: Fields) -> Fields:
    q = codes["q"]
    return {"high": _join_high_bits(q >> 2), "low": _join_planes(q & 3), "scales": _join_six_bits(codes["sc"])}


def _split_q3_k(fields: Fields) -> Fields:
    q = _split_planes(fields["low"]) | _split_high_bits(fields["high"]) << 2
    return {"q": q, "sc": _split_six_bits(fields["scales"])}


def _join_nibbles_of(q: Codes, together: int) -> Codes:
    """Four-bit codes [..., 256] to 128 bytes, `together` weights after the others: first half low, second half high."""
    return join_nibbles(q.reshape(*q.shape[:-1], -1, together)).reshape(*q.shape[:-1], SUPER_BLOCK // 2)


def _split_nibbles_of(data: Codes, together: int) -> Codes:
    return split_nibbles(data.reshape(*data.shape[:-1], -1, together // 2)).reshape(*data.shape[:-1], SUPER_BLOCK)


def _join_q4_k(codes: Fields) -> Fields:
    return {"scales": _join_scales_and_minima(codes["sc"], codes["m"]), "low": _join_nibbles_of(codes["q"], 64)}


def _split_q4_k(fields: Fields) -> Fields:
    sc, m = _split_scales_and_minima(fields["scales"])
    return {"q": _split_nibbles_of(fields["low"], 64), "sc": sc, "m": m}


def _join_q5_k(codes: Fields) -> Fields:
    q = codes["q"]
    return _join_q4_k(codes | {"q": q & 15}) | {"high": _join_high_bits(q >> 4)}


def _split_q5_k(fields: Fields) -> Fields:
    codes = _split_q4_k(fields)
    return codes | {"q": codes["q"] | _split_high_bits(fields["high"]) << 4}


def _join_q6_k(codes: Fields) -> Fields:
    q = codes["q"]
    return {"low": _join_nibbles_of(q & 15, 128), "high": _join_planes(q >> 4), "scales": flip_sign(codes["sc"])}


def _split_q6_k(fields: Fields) -> Fields:
    q = _split_nibbles_of(fields["low"], 128) | _split_planes(fields["high"]) << 4
    return {"q": q, "sc": flip_sign(fields["scales"])}


def _join_iq4_xs(codes: Fields) -> Fields:
    """Eight six-bit scales to two bytes, the high bits of four in each, and four bytes, the nibbles of two in each."""
    pairs, fours = (codes["sc"].reshape(*codes["sc"].shape[:-1], -1, n) for n in (2, 4))
    return {
        "scales_high": join_quarters((fours >> 4)[..., None])[..., 0],
        "scales_low": join_nibbles(pairs & 15)[..., 0],
        "low": _join_nibbles_of(codes["q"], 32),
    }


def _split_iq4_xs(fields: Fields) -> Fields:
    high, low = fields["scales_high"], fields["scales_low"]
    sc = split_nibbles(low[..., None]).reshape(*low.shape[:-1], 8)
    sc |= split_quarters(high[..., None]).reshape(*high.shape[:-1], 8) << 4
    return {"q": _split_nibbles_of(fields["low"], 32), "sc": sc}


@dataclass(frozen=True)
class SuperblockPacker:
    """Packer of one super-block type.

    Its arrays: `q` uint8 [rows, columns]; `d` float16 [rows, columns / 256] and `sc` uint8 [rows, columns / group];
    with minima also `dmin` as `d` and `m` as `sc`.

    Attributes:
        type: name of the type.
        bits: bits of a code.
        group: weights per group.
        scale_bits: bits of a group's scale, and of its minimum.
        layout: the fields of a super-block in order, with their bytes. Fields `d` and `dmin` are parameters, the others
            are what `join` makes.
        join: `q` [rows, blocks, 256], `sc` and `m` [rows, blocks, 256 / group] to fields [rows, blocks, bytes].
        split: inverts `join`.
        levels: what scales multiply, a whole number for every code; None where codes count from a minimum.
    """

    type: str
    bits: int
    group: int
    scale_bits: int
    layout: Mapping[str, int]
    join: Callable[[Fields], Fields]
    split: Callable[[Fields], Fields]
    levels: Sequence[int] | None = None

    @property
    def _halves(self) -> tuple[str, ...]:
        return ("d", "dmin") if self.levels is None else ("d",)

    @property
    def _scales(self) -> tuple[str, ...]:
        return ("sc", "m") if self.levels is None else ("sc",)

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes].

        Raises:
            ValueError: wrong shapes or dtypes, codes out of range, or parameters that are not finite.
        """
        q = arrays["q"]
        rows, blocks = check_columns(self.type, q, SUPER_BLOCK)
        per_block = SUPER_BLOCK // self.group
        check_codes(self.type, "q", q, q.shape, (1 << self.bits) - 1)
        codes = {"q": q.reshape(rows, blocks, SUPER_BLOCK)}
        for name in self._scales:
            check_codes(self.type, name, arrays[name], (rows, blocks * per_block), (1 << self.scale_bits) - 1)
            codes[name] = arrays[name].reshape(rows, blocks, per_block)
        fields = self.join(codes)
        for name in self._halves:
            check_halves(self.type, name, arrays[name], (rows, blocks))
            fields[name] = half_bytes(arrays[name])
        return np.concatenate([fields[name] for name in self.layout], axis=2).reshape(rows, -1)

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        blocks = data.reshape(len(data), -1, sum(self.layout.values()))
        parts = np.split(blocks, np.cumsum([*self.layout.values()])[:-1], axis=2)
        fields = dict(zip(self.layout, parts, strict=True))
        arrays: dict[str, NDArray[Any]] = {name: halves(fields[name]) for name in self._halves}
        return arrays | {name: codes.reshape(len(data), -1) for name, codes in self.split(fields).items()}

    def dequantize(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Weights float32 [rows, columns], in the order of operations of the C reference."""
        rows, columns = arrays["q"].shape
        q = arrays["q"].reshape(rows, columns // self.group, self.group)
        sc, d = arrays["sc"].astype(np.float32), self._per_group(arrays["d"])
        if self.levels is None:
            minimum = self._per_group(arrays["dmin"]) * arrays["m"].astype(np.float32)
            weights = (d * sc)[..., None] * q.astype(np.float32) - minimum[..., None]
        else:
            scale = d * (sc - np.float32(1 << (self.scale_bits - 1)))
            weights = scale[..., None] * np.asarray(self.levels, np.float32)[q]
        return weights.reshape(rows, columns)

    def _per_group(self, values: NDArray[np.float16]) -> NDArray[np.float32]:
        """Parameters of super-blocks [rows, blocks], once for each group: float32 [rows, columns / group]."""
        return np.repeat(values.astype(np.float32), SUPER_BLOCK // self.group, axis=1)


_MIN4 = {"d": 2, "dmin": 2, "scales": 12}
_XS = {"d": 2, "scales_high": 2, "scales_low": 4, "low": 128}

Q2_K = SuperblockPacker("q2_k", 2, 16, 4, {"scales": 16, "low": 64, "d": 2, "dmin": 2}, _join_q2_k, _split_q2_k)
Q3_K = SuperblockPacker(
    "q3_k", 3, 16, 6, {"high": 32, "low": 64, "scales": 12, "d": 2}, _join_q3_k, _split_q3_k, range(-4, 4)
)
Q4_K = SuperblockPacker("q4_k", 4, 32, 6, _MIN4 | {"low": 128}, _join_q4_k, _split_q4_k)
Q5_K = SuperblockPacker("q5_k", 5, 32, 6, _MIN4 | {"high": 32, "low": 128}, _join_q5_k, _split_q5_k)
Q6_K = SuperblockPacker(
    "q6_k", 6, 16, 8, {"low": 128, "high": 64, "scales": 16, "d": 2}, _join_q6_k, _split_q6_k, range(-32, 32)
)
IQ4_XS = SuperblockPacker("iq4_xs", 4, 32, 6, _XS, _join_iq4_xs, _split_iq4_xs, IQ4_LEVELS)
