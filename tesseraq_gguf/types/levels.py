"""Levels: what scales multiply in grids whose zero-point no method learns.

They are even, q - middle, or codewords, integers of up to 8 bits that ascend with q in uneven steps. How scales are
stored is another matter: families combine one with the other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types.grid import Arrays, Grid, Rounder
from tesseraq_gguf.types.quantized import QuantizedTensor

REACH = 32
"""Power of two above the magnitudes of most codewords."""


def nearest_indices(codebooks: Tensor, reach: int = REACH) -> Tensor:
    """Index of the codeword nearest to x by floor(2x) + 2·reach, int64 [codebooks, 4·reach].

    Halfway between two codewords is a multiple of one half, so the floor loses nothing; there the upper one counts.
    """
    half = torch.arange(-2 * reach, 2 * reach, device=codebooks.device)
    borders = codebooks[:, 1:].to(torch.int64) + codebooks[:, :-1]
    return (half[:, None] >= borders[:, None, :]).sum(2)


def halves(x: Tensor, reach: int = REACH) -> Tensor:
    """floor(2x) + 2·reach within 0 … 4·reach - 1, int64."""
    return (2 * x).floor_().clamp_(-2 * reach, 2 * reach - 1).add_(2 * reach).to(torch.int64)


@dataclass(frozen=True)
class SignedLevelsGrid(Grid):
    """A grid scale·level whose levels are on both sides of 0, and the same everywhere."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """The lowest level and the highest."""

    @abstractmethod
    def nearest(self, position: Tensor) -> Tensor:
        """The levels nearest to weights in units of their scales, float32 of any shape."""

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {}


@dataclass(frozen=True)
class EvenGrid(SignedLevelsGrid):
    """Levels q - middle.

    Attributes:
        middle: the fixed zero-point.
    """

    middle: float

    @property
    @override
    def ends(self) -> tuple[float, float]:
        return -self.middle, self.highest - self.middle

    @override
    def nearest(self, position: Tensor) -> Tensor:
        return (position + self.middle).round_().clamp_(0, self.highest).sub_(self.middle)

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(self.scale(arrays), self.middle)

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        q = self.grouped(tensor.arrays["q"]).float() - self.middle
        return (q * self.scale(tensor.arrays)[..., None]).flatten(-2)


@dataclass(frozen=True)
class CodewordGrid(Grid):
    """Levels that codes name: what a grid of codebooks has in common with one of a single table."""

    @property
    @override
    def uniform(self) -> bool:
        return False

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(self.scale(arrays))

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {}

    @abstractmethod
    def codewords(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Codewords of a matrix, float32 [rows, columns]."""

    @override
    def levels(self, tensor: QuantizedTensor) -> Tensor:
        return self.grouped(self.codewords(tensor.arrays))

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        return (self.levels(tensor) * self.scale(tensor.arrays)[..., None]).flatten(-2)


@dataclass(frozen=True)
class TableGrid(CodewordGrid, SignedLevelsGrid):
    """Levels out of one table.

    Attributes:
        table: whole numbers, ascending, one for each code.
    """

    table: tuple[int, ...]

    @property
    @override
    def ends(self) -> tuple[float, float]:
        return self.table[0], self.table[-1]

    @override
    def nearest(self, position: Tensor) -> Tensor:
        lookup = _lookup(self.table, position.device)
        return lookup.nearest.take(halves(position, lookup.reach))

    @override
    def codewords(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return _lookup(self.table, arrays["q"].device).levels[arrays["q"].to(torch.int64)]

    @override
    def encode(self, weight: Tensor, arrays: Mapping[str, Tensor], importance: Tensor | None = None) -> Tensor:
        lookup = _lookup(self.table, weight.device)
        position = self.grouped(weight) / self.scale(arrays)[..., None]
        return lookup.index.take(halves(position, lookup.reach)).to(torch.uint8).flatten(-2)

    @override
    def neighbours(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        lookup = _lookup(self.table, weight.device)
        position = (self.grouped(weight) / self.scale(arrays)[..., None]).flatten(-2)
        # the nearest level is one of both: the other is beyond the weight
        near = lookup.index.take(halves(position, lookup.reach))
        code = (near - (lookup.levels[near] > position).to(torch.int64)).clamp_(0, self.highest - 1)
        lower = lookup.levels[code]
        gap = lookup.levels[code + 1] - lower
        return code.to(torch.uint8), lower.to(torch.int8), gap.to(torch.uint8)

    @override
    def rounder(self, arrays: Arrays) -> Rounder:
        return _TableRounder(self, arrays)


@dataclass(frozen=True)
class _Lookup:
    """A table, and what to look positions up in by their `halves`: index int64 and level float32 [4·reach]."""

    reach: int
    levels: Tensor
    index: Tensor
    nearest: Tensor


@cache
def _lookup(table: tuple[int, ...], device: torch.device) -> _Lookup:
    levels = torch.tensor(table, device=device)
    reach = 1 << int(levels.abs().max()).bit_length()
    index = nearest_indices(levels[None], reach)[0]
    return _Lookup(reach, levels.float(), index, levels.float()[index])


class _TableRounder(Rounder):
    def __init__(self, grid: TableGrid, arrays: Arrays) -> None:
        self.arrays = arrays
        self._lookup = _lookup(grid.table, next(iter(arrays.values())).device)
        # column by column: transposed, a column is contiguous
        self._scale = grid.scale(arrays).repeat_interleave(grid.group, 1).T.contiguous()

    def __call__(self, column: int, block: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        scale = self._scale[column]
        q = self._lookup.index.take(halves(block[column] / scale, self._lookup.reach))
        return q.float(), scale * self._lookup.levels[q]
