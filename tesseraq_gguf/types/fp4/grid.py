"""Grids of MXFP4 and NVFP4: levels of 4-bit floats, and scales of 8 bits that are never negative.

The steps between such scales are coarse, and those that could serve a group are few: the search tries them.

NVFP4 may have a factor for a whole matrix, which brings scales to where their steps are finest. It is a power of two:
what lies between powers of two changed the squared error of real matrices by a thousandth, up or down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types.facts import FACTOR
from tesseraq_gguf.types.fp4 import packer
from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.levels import TableGrid
from tesseraq_gguf.types.quantized import QuantizedTensor

_LARGEST = 5
"""Power of two that the largest weight of a matrix is brought to by a factor, or next below: in the middle of what
scales have fine steps for, since methods move weights up and down."""

_FACTORS = 100
"""Powers of two, up and down, that a factor can be: far from the ends of float32."""


@dataclass(frozen=True)
class CodedScalesGrid(TableGrid):
    """The grid d·table[q] with coded scales. Its array: `d` uint8 [rows, groups].

    Where a file has a factor for the matrix, the values are (d·table[q])·factor, and finished matrices bring it along
    in `factor`, float32 [rows, 1], the same in every row.

    Attributes:
        chosen: the codes that scales get, ascending.
        tried: what a search tries, counted from the code that brings the largest weight to the largest level.
        finest: the first code from which on steps between scales are as fine as they get; 0 if all are.
        factor: of the matrix; None if its file has none.
    """

    chosen: range
    tried: tuple[int, ...]
    finest: int = 0
    factor: float | None = None

    @property
    @override
    def wanted(self) -> tuple[float, float] | None:
        scales = _scales(self.type, torch.device("cpu")) * self._factor
        ends = (float(scales[code]) * self.ends[1] for code in (self.finest, self.chosen[-1]))
        return (next(ends), next(ends)) if self.finest else None

    @property
    def _factor(self) -> float:
        return 1.0 if self.factor is None else self.factor

    @override
    def with_factor_for(self, weight: Tensor) -> Grid:
        if not self.finest:
            return self
        largest = float(weight.abs().max())
        power = math.ceil(math.log2(largest)) - _LARGEST if largest > 0 else 0
        return replace(self, factor=2.0 ** max(-_FACTORS, min(_FACTORS, power)))

    @override
    def of(self, arrays: Mapping[str, Tensor]) -> Grid:
        return replace(self, factor=float(arrays[FACTOR][0, 0]) if FACTOR in arrays else None)

    @override
    def assemble(self, q: Tensor, arrays: Mapping[str, Tensor]) -> QuantizedTensor:
        assembled = super().assemble(q, arrays)
        if self.factor is not None and FACTOR not in arrays:
            assembled.arrays[FACTOR] = torch.full((len(q), 1), self.factor, device=q.device)
        return assembled

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self._coded(arrays) * arrays.get(FACTOR, self._factor)

    def _coded(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return _scales(self.type, arrays["d"].device)[arrays["d"].to(torch.int64)]

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        coded = (self.levels(tensor) * self._coded(tensor.arrays)[..., None]).flatten(-2)
        return coded * tensor.arrays.get(FACTOR, self._factor)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        scales = _scales(self.type, scale.device)[self.chosen.start : self.chosen.stop]
        borders = (scales[1:] + scales[:-1]) / 2
        return {"d": (torch.bucketize(scale / self._factor, borders) + self.chosen.start).to(torch.uint8)}

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = weight, importance
        middle = self.settle_scale(w.abs().amax(1) / self.ends[1])["d"].to(torch.int16)
        best_error = torch.full_like(w[:, 0], torch.inf)
        best = torch.zeros_like(middle, dtype=torch.uint8)
        for step in self.tried:
            code = (middle + step).clamp(self.chosen[0], self.chosen[-1]).to(torch.uint8)
            scale = self.scale({"d": code})[:, None]
            error = (h * (scale * self.nearest(w / scale) - w) ** 2).sum(1)
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, code, best)
        return {"d": best[:, None]}


@cache
def _scales(type: str, device: torch.device) -> Tensor:
    """Scales by code, float32 [256]."""
    return torch.from_numpy(packer.of(type).decode(np.arange(256, dtype=np.uint8))).to(device)


def coded(type: str, group: int, chosen: range, tried: tuple[int, ...], finest: int = 0) -> CodedScalesGrid:
    """Return a grid of 4-bit floats."""
    return CodedScalesGrid(
        type=type,
        bits=4,
        group=group,
        span=group,
        learns_zero=False,
        table=packer.FP4_LEVELS,
        chosen=chosen,
        tried=tried,
        finest=finest,
    )


# from 2^-24, the smallest scale of other types: nothing needs smaller ones, and quotients stay finite
MXFP4 = coded("mxfp4", 32, range(104, packer.NO_E8M0), (0, -2, -1, 1))
NVFP4 = coded("nvfp4", 16, range(1, packer.NO_UE4M3), (0, *range(-6, 0), 1, 2), finest=8)
