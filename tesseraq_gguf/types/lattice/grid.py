"""Grids of the lattice types: super-blocks of 256 weights, values d·(2·sc + 1)·unit·level.

A level is a signed magnitude, and four or eight neighbours have those of one point (`points.py`): they are rounded
together, and one variable of learning moves them together. In the terms of every grid: scale = d·(2·sc + 1)·unit, and
a zero-point of 0, or of IQ1_S -1/8 or 1/8, which the search chooses and learning keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types.grid import Arrays, Rounder, importance_of
from tesseraq_gguf.types.kquants.packer import SUPER_BLOCK
from tesseraq_gguf.types.lattice import packer as packers
from tesseraq_gguf.types.lattice.packer import SIGNED, LatticePacker, Signs
from tesseraq_gguf.types.lattice.points import Magnitudes, Points
from tesseraq_gguf.types.levels import CodewordGrid
from tesseraq_gguf.types.quantized import QuantizedTensor
from tesseraq_gguf.types.search import SMALLEST
from tesseraq_gguf.types.stock.grid import half
from tesseraq_gguf.types.super_blocks import SuperBlockGrid

_REACHES = tuple(1.3 * 0.87**step for step in range(7))
"""Shares of a group's largest weight that the largest level is tried for."""

_BETWEEN = (0.935, 1.07)
"""Halfway from the best of these to the next."""

_DIVISORS = (1.08, 1.04, 1.0, 0.96, 0.92, 0.88, 0.84)
"""Shares of the largest scale that the largest `sc` is tried for."""

_CANDIDATES = 16
"""Near points among which GPTQ chooses."""

_REFITS = 1
"""Alternations of points and parameters in the search."""


@dataclass(frozen=True)
class LatticeGrid(CodewordGrid, SuperBlockGrid):
    """The grid d·(2·sc + 1)·unit·level. Its arrays: `d` float16 [rows, super-blocks], `sc` uint8 [rows, groups].

    Attributes:
        unit: what a group's scale is multiplied by.
        steps: largest `sc`.
        points: levels of neighbours.
    """

    unit: float
    steps: int
    points: Points = field(compare=False)

    @property
    @override
    def vector(self) -> int:
        return self.points.weights

    @property
    @override
    def coupled(self) -> int:
        return SIGNED

    @property
    @override
    def dtype(self) -> torch.dtype:
        return torch.int8

    @property
    def reach(self) -> float:
        """Largest magnitude of a weight in units of its scale."""
        return self.points.largest

    @property
    def zeros(self) -> tuple[float, ...]:
        """The zero-points that a group can have."""
        return (0.0,)

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.of_groups(arrays["d"]) * self.factors(arrays)

    def factors(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What d is multiplied by, float32 [rows, groups]."""
        return (2 * arrays["sc"].float() + 1) * self.unit

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        d, sc = self.settled(scale.unflatten(-1, (-1, self.groups)), torch.ones((), device=scale.device))
        return {"d": d, "sc": sc.flatten(-2)}

    @override
    def codewords(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["q"].float()

    @override
    def encode(self, weight: Tensor, arrays: Mapping[str, Tensor], importance: Tensor | None = None) -> Tensor:
        x = self._in_units(weight, arrays)
        h = torch.ones_like(x) if importance is None else importance.expand_as(weight).reshape(x.shape)
        return self._nearest(x, h).to(torch.int8).view(weight.shape)

    @override
    def neighbours(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q = arrays["q"] if "q" in arrays else self.encode(weight, arrays)
        x = self._in_units(weight, arrays).view(-1, self.vector)
        levels = q.float().view(x.shape)
        other = self._points(weight.device).other(x, torch.ones_like(x), levels)
        return q, q, (other - levels).to(torch.int8).view(weight.shape)

    @override
    def pick(self, code: Tensor, gap: Tensor | None, up: Tensor) -> Tensor:
        assert gap is not None
        return code + gap * up

    @override
    def rounder(self, arrays: Arrays) -> Rounder:
        return _LatticeRounder(self, arrays)

    def _points(self, device: torch.device) -> Points:
        return self.points.to(device)

    def _in_units(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Where weights [rows, columns] are among the points, by those whose signs stand together: [n, 8]."""
        return (self.grouped(weight) / self.scale(arrays)[..., None] + self.zero(arrays)[..., None]).view(-1, SIGNED)

    def _nearest(self, x: Tensor, h: Tensor) -> Tensor:
        """Levels of weights whose signs stand together, in units of the scale: [n, 8] to the same."""
        points = self._points(x.device)
        s = points.signs(x, h)
        x, h = ((a).view(-1, self.vector) for a in (s * x, h))
        return s * points.nearest(x, h).view(s.shape)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        return _Search(self, self.grouped(weight), self.grouped(importance)).found()

    def settled(self, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Write scales [rows, super-blocks, groups] as a half float and integers, errors squared and weighted.

        Returns:
            The half floats [rows, super-blocks] and the integers, uint8 of the scales' shape.
        """
        reach = scale.amax(-1) / (self.unit * (2 * self.steps + 1))
        best = torch.full_like(reach, torch.inf)
        best_d, best_sc = half(reach), torch.zeros_like(scale, dtype=torch.uint8)
        for share in _DIVISORS:
            d = half(reach * share)
            step = d.float()[..., None] * self.unit
            sc = ((scale / step - 1) / 2).round().clamp(0, self.steps)
            error = (weight * (step * (2 * sc + 1) - scale).square()).sum(-1)
            better = error < best
            best, best_d = torch.where(better, error, best), torch.where(better, d, best_d)
            best_sc = torch.where(better[..., None], sc.to(torch.uint8), best_sc)
        return best_d, best_sc


@dataclass(frozen=True)
class ShiftedLatticeGrid(LatticeGrid):
    """The grid d·(2·sc + 1)·unit·(level ± shift). It has one array more: `lower`, uint8 as `sc`, 1 where it is minus.

    Attributes:
        shift: a zero-point, or one with a minus, that each group has.
    """

    shift: float

    @property
    @override
    def reach(self) -> float:
        return self.points.largest + self.shift

    @property
    @override
    def zeros(self) -> tuple[float, ...]:
        return (-self.shift, self.shift)

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return (2 * arrays["lower"].float() - 1) * self.shift

    @override
    def fixed(self, arrays: Mapping[str, Tensor]) -> Arrays:
        return {"lower": arrays["lower"]}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {"lower": (zero > 0).to(torch.uint8)}

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        levels = self.levels(tensor) - self.zero(tensor.arrays)[..., None]
        return (levels * self.scale(tensor.arrays)[..., None]).flatten(-2)


_Found = tuple[Tensor, Tensor, Tensor]
"""Scales of groups, their zero-points, and the errors with both: [spans, groups] each."""


class _Search:
    """The search of parameters.

    Each group finds the scale that suits it best, these are written as the type has them, and points, half floats and
    integers are fitted to each other in turn.

    Args:
        grid: of the type.
        w: weights float32 [spans, groups, group].
        h: importances of the same shape.
    """

    def __init__(self, grid: LatticeGrid, w: Tensor, h: Tensor) -> None:
        self._grid, self._points = grid, grid.points.to(w.device)
        self._w, self._h = w, h
        self._energy, self._sum, self._total = (h * w * w).sum(-1), (h * w).sum(-1), h.sum(-1)

    def found(self) -> Arrays:
        """The parameters, each [spans, …]."""
        scale, zero = self._ladder()
        hq, hqq = self._fits(scale, zero)
        scale = torch.where(hq > 0, hq / hqq, scale)
        d, sc = self._grid.settled(scale[:, None], hqq[:, None])
        arrays = {"d": d, "sc": sc[:, 0]} | self._grid.settle_zero(zero, scale)
        best, best_error = arrays, torch.full_like(scale[:, 0], torch.inf)
        for last in range(_REFITS, -1, -1):
            arrays, error = self._of_groups(arrays)
            better = (error < best_error)[:, None]
            best = {key: torch.where(better, array, best[key]) for key, array in arrays.items()}
            best_error = torch.where(better[:, 0], error, best_error)
            if last:
                arrays = self._half_float(arrays)
        return best

    def _ladder(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero-point of each group with the least error among a few, [spans, groups] each."""
        reach = (self._w.abs().amax(-1) / self._grid.reach).clamp_min(SMALLEST)
        best = reach, torch.zeros_like(reach), torch.full_like(reach, torch.inf)
        for share, of_all in product((*_REACHES, self._points.alike), self._grid.zeros):
            best = self._better(best, reach * share, torch.full_like(reach, of_all))
        scale, zero, _ = best
        for share in _BETWEEN:
            best = self._better(best, scale * share, zero)
        return best[:2]

    def _better(self, best: _Found, scale: Tensor, zero: Tensor) -> _Found:
        """The better, group by group, of what was found and another scale and zero-point, [spans, groups] each."""
        error = self._error(scale, zero)
        better = error < best[2]
        return torch.where(better, scale, best[0]), torch.where(better, zero, best[1]), torch.minimum(error, best[2])

    def _half_float(self, arrays: Arrays) -> Arrays:
        """The arrays with the best half floats for their points."""
        hq, hqq = self._fits(self._grid.scale(arrays), self._grid.zero(arrays))
        factors = self._grid.factors(arrays)
        d = (hq * factors).sum(-1) / (hqq * factors.square()).sum(-1)
        return arrays | {"d": half(d)[:, None]}

    def _of_groups(self, arrays: Arrays) -> tuple[Arrays, Tensor]:
        """The arrays with the best integers near theirs and the best zero-points, and the error of each span."""
        scale = self._grid.scale(arrays)
        best, least = arrays, torch.full_like(scale, torch.inf)
        for move, zero in product((0, -1, 1), self._grid.zeros):
            sc = (arrays["sc"].int() + move).clamp(0, self._grid.steps).to(torch.uint8)
            trial = {"d": arrays["d"], "sc": sc} | self._grid.settle_zero(torch.full_like(scale, zero), scale)
            error = self._error(self._grid.scale(trial), self._grid.zero(trial))
            better = error < least
            least = torch.where(better, error, least)
            best = best | {key: torch.where(better, trial[key], best[key]) for key in trial if key != "d"}
        return best, least.sum(-1)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Weighted squared error of each group, for scales and zero-points, all [spans, groups]."""
        x = self._unsigned(scale, zero)
        least = self._points.least(x, self._h.view(x.shape)).view(*scale.shape, -1).sum(-1)
        offset = scale * zero
        return self._energy + offset * (2 * self._sum + offset * self._total) + least * scale.square()

    def _fits(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Σ h·w·v and Σ h·v² of each group, [spans, groups], with w = scale·v for the points that such scales give."""
        x = self._unsigned(scale, zero)
        q = self._points.nearest(x, self._h.view(x.shape)).view(self._w.shape)
        v = q - zero[..., None]  # there are none where signs are taken off
        hv = self._h * v
        return (hv * (x.view(q.shape) - zero[..., None])).sum(-1) * scale, (hv * v).sum(-1)

    def _unsigned(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Where weights are among the points, with their signs taken off: [n, weights of a point]."""
        x = self._w / scale[..., None] + zero[..., None]
        together = x.view(-1, SIGNED)
        s = self._points.signs(together, self._h.view(together.shape))
        return (s * together).view(-1, self._points.weights)


class _LatticeRounder(Rounder):
    """Rounds the weights of a point when the first of them comes up, as the block is then.

    Of a few points near by, it takes the one that leaves least once each weight's error has moved those after it.
    Where signs hold a parity over more than a point, the second point takes what the first has left.
    """

    def __init__(self, grid: LatticeGrid, arrays: Arrays) -> None:
        self.arrays = arrays
        self._group, self._vector, self._points = grid.group, grid.vector, grid.points.to(arrays["d"].device)
        self._scale, self._zero = (a.T.contiguous() for a in (grid.scale(arrays), grid.zero(arrays)))  # [groups, rows]
        self._q = torch.zeros(self._vector, self._scale.shape[1], device=self._scale.device)
        self._odd = torch.zeros_like(self._q[0], dtype=torch.bool)

    @override
    def __call__(self, column: int, block: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = (of_groups[column // self._group] for of_groups in (self._scale, self._zero))
        if column % SIGNED == 0:
            self._odd = torch.zeros_like(self._odd)
        if column % self._vector == 0:
            ahead = slice(column, column + SIGNED - column % SIGNED)
            self._choose((block[ahead] / scale + zero).T, factor[ahead, ahead])
        q = self._q[column % self._vector]
        return q, scale * (q - zero)

    def _choose(self, x: Tensor, factor: Tensor) -> None:
        """Choose a point for the first of the weights whose signs stand together, float32 [rows, weights]."""
        h = importance_of(factor).expand_as(x)
        s = self._points.signs(x, h, self._odd)
        x, h, s = (a[:, : self._vector] for a in (x, h, s))
        near = self._points.few(x, h, s, _CANDIDATES)
        eye = torch.eye(self._vector, device=x.device)
        inverse = torch.linalg.solve_triangular(factor[: self._vector, : self._vector], eye, upper=True)
        left = ((x[:, None] - near) @ inverse).square().sum(-1)
        self._q = near[torch.arange(len(near), device=x.device), left.argmin(1)].T.contiguous()
        self._odd = self._odd ^ ((self._q < 0).sum(0) % 2 == 1)


def _of(packer: LatticePacker, bits: int) -> LatticeGrid:
    """Return the grid that goes with a packer; bits are those of a weight, about."""
    levels = torch.from_numpy(packer.points).float()
    points = Points(levels) if packer.signs is Signs.INSIDE else Magnitudes(levels, packer.signs is Signs.EVEN)
    same = (packer.type, bits, packer.group, SUPER_BLOCK, False, packer.unit, packer.steps, points)
    return ShiftedLatticeGrid(*same, packer.shift) if packer.shift else LatticeGrid(*same)


IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S = (
    _of(packer, 2) for packer in (packers.IQ1_S, packers.IQ1_M, packers.IQ2_XXS, packers.IQ2_XS, packers.IQ2_S)
)
IQ3_XXS, IQ3_S = (_of(packer, 3) for packer in (packers.IQ3_XXS, packers.IQ3_S))
