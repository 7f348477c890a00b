"""Grids of llama.cpp's one-level types: a half float d for each group, with a fixed zero-point or a half float offset.

Q2_0, Q4_0, Q5_0, Q8_0: d·(q - zero), d of either sign. IQ4_NL: d·level, with levels out of a table. Q1_0: d or -d.
Q4_1, Q5_1: d·q + m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types import search
from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.levels import EvenGrid, SignedLevelsGrid, TableGrid
from tesseraq_gguf.types.quantized import QuantizedTensor
from tesseraq_gguf.types.stock.packer import IQ4_LEVELS

_LARGEST = 65504.0
"""Largest half float."""


def half(x: Tensor) -> Tensor:
    """Round float32 to half floats, finite, and never to 0 where a scale would vanish."""
    kept = torch.where(x.abs() < search.SMALLEST, torch.where(x < 0, -search.SMALLEST, search.SMALLEST), x)
    return kept.clamp(-_LARGEST, _LARGEST).half()


@dataclass(frozen=True)
class HalfGrid(SignedLevelsGrid):
    """Scales d, whatever the levels. Its array: `d`, float16 of either sign, [rows, groups]."""

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["d"].float()

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return {"d": half(scale)}

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = weight, importance
        best_error = torch.full_like(w[:, 0], torch.inf)
        best = torch.zeros_like(best_error, dtype=torch.float16)
        for candidate in search.symmetric(w, h, self.nearest, self.ends, search.shrinks(self.bits)):
            settled = self.settle_scale(candidate)
            scale = self.scale(settled)[:, None]
            error = (h * (scale * self.nearest(w / scale) - w) ** 2).sum(1)
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, settled["d"], best)
        return {"d": best[:, None]}


@dataclass(frozen=True)
class SymmetricGrid(EvenGrid, HalfGrid):
    """The grid d·(q - middle)."""


@dataclass(frozen=True)
class BinaryGrid(SymmetricGrid):
    """The grid d·(2·q - 1). The codes are one scale apart, so the scale is 2·d."""

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return 2 * super().scale(arrays)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return super().settle_scale(scale / 2)


@dataclass(frozen=True)
class HalfTableGrid(TableGrid, HalfGrid):
    """The grid d·table[q]."""


@dataclass(frozen=True)
class OffsetGrid(Grid):
    """The grid d·q + m. Its arrays: `d` and `m`, float16 [rows, groups]."""

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["d"].float()

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return -arrays["m"].float() / arrays["d"].float()

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return {"d": half(scale)}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {"m": (-zero * scale).clamp(-_LARGEST, _LARGEST).half()}

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        d, m = tensor.arrays["d"].float()[..., None], tensor.arrays["m"].float()[..., None]
        return (self.grouped(tensor.arrays["q"]).float() * d + m).flatten(-2)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = weight, importance
        best_error = torch.full_like(w[:, 0], torch.inf)
        best_d = torch.zeros_like(best_error, dtype=torch.float16)
        best_m = torch.zeros_like(best_d)
        for scale, zero in search.asymmetric(w, h, self.highest, search.fine_shrinks(self.bits)):
            d = half(scale)
            m = self.settle_zero(zero, d.float())["m"]
            s, offset = d.float()[:, None], m.float()[:, None]
            q = ((w - offset) / s).round_().clamp_(0, self.highest)
            error = (h * (s * q + offset - w) ** 2).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_d, best_m = torch.where(better, d, best_d), torch.where(better, m, best_m)
        return {"d": best_d[:, None], "m": best_m[:, None]}


def symmetric(type: str, bits: int, group: int) -> SymmetricGrid:
    """Return a grid with the zero-point in the middle; with 2 bits it is 1: {-1, 0, 1, 2}·d."""
    middle = 1 if bits == 2 else 1 << (bits - 1)
    return SymmetricGrid(type=type, bits=bits, group=group, span=group, learns_zero=False, middle=middle)


def offset(type: str, bits: int, group: int) -> OffsetGrid:
    """Return a grid with a half float offset."""
    return OffsetGrid(type=type, bits=bits, group=group, span=group, learns_zero=True)


Q1_0 = BinaryGrid(type="q1_0", bits=1, group=128, span=128, learns_zero=False, middle=0.5)
Q2_0 = symmetric("q2_0", bits=2, group=64)
Q4_0 = symmetric("q4_0", bits=4, group=32)
Q4_1 = offset("q4_1", bits=4, group=32)
Q5_0 = symmetric("q5_0", bits=5, group=32)
Q5_1 = offset("q5_1", bits=5, group=32)
Q8_0 = symmetric("q8_0", bits=8, group=32)
IQ4_NL = HalfTableGrid(type="iq4_nl", bits=4, group=32, span=32, learns_zero=False, table=IQ4_LEVELS)
