"""Grid: the values a tensor type can hold, as every method sees them.

Nearly all our grids are affine: value = scale·(q - zero), with integer codes q from 0 to 2^bits - 1 and one scale and
one zero-point for each group of neighbouring weights of a row. They differ in how scales and zero-points are stored: as
small floats, as half floats, or as small integers that share a half float with a super-block. Where codes name
codewords instead (`uniform` is False), value = scale·(level - zero), and no zero-point is learned: nearly all are 0. Of
a lattice, neighbouring weights have levels that go together (`vector`).

Matrices are [rows, columns]; grouped matrices [rows, groups, group]; scales and zero-points [rows, groups]. What a
type stores is named `arrays`: codes under `q`, parameters under the names of the type. Arithmetic is float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.types.quantized import QuantizedTensor

Arrays = dict[str, Tensor]
"""Stored parameters of a matrix by name, each with the matrix's rows first."""

_SEARCH_CHUNK = 1 << 21
"""Weights whose parameters are searched at a time: bounds the memory of the candidates."""


@dataclass(frozen=True)
class Grid(ABC):
    """An affine grid.

    Attributes:
        type: name of the tensor type whose grid this is.
        bits: bits of a code.
        group: weights that share a scale and a zero-point.
        span: weights whose parameters are stored together and can only be found together: a super-block, or `group`.
        learns_zero: False if the type fixes the zero-point.
    """

    type: str
    bits: int
    group: int
    span: int
    learns_zero: bool

    @property
    def highest(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def uniform(self) -> bool:
        """Whether all codes from 0 to the highest are there, one scale apart; False where codes name codewords."""
        return True

    @property
    def wanted(self) -> tuple[float, float] | None:
        """Magnitudes between which the largest weight of a group has a fine scale; None if it has one wherever."""
        return None

    @property
    def vector(self) -> int:
        """Neighbouring weights that are rounded together, and that one variable of learning moves."""
        return 1

    @property
    def coupled(self) -> int:
        """Neighbouring weights whose nearest codes depend on each other: one vector, or some."""
        return self.vector

    @property
    def dtype(self) -> torch.dtype:
        """Of codes: uint8, or int8 where codes are signed levels."""
        return torch.uint8

    @property
    def places(self) -> tuple[int, int] | None:
        """Places of a block, and how many of them, the first, are for salient weights; None if all are alike."""
        return None

    @property
    def ordered(self) -> bool:
        """Whether the places of a block differ, so that an order of the columns is chosen (`column_order.py`)."""
        return self.places is not None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a span is made of, in the order in which columns should be rounded: all spans' first parts first."""
        return ((self, range(self.span)),)

    def spread(self, variables: Tensor) -> Tensor:
        """Give groups the variables that they share: [rows, variables of all spans] to [rows, groups]."""
        return variables

    def gather(self, of_groups: Tensor) -> Tensor:
        """Invert `spread`: [rows, groups] to [rows, variables]."""
        return of_groups

    @abstractmethod
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Scales float32 [rows, groups] of stored parameters."""

    @abstractmethod
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Zero-points float32 [rows, groups] of stored parameters."""

    @abstractmethod
    def settle_scale(self, scale: Tensor) -> Arrays:
        """Store scales [rows, groups] as nearly as the type can."""

    @abstractmethod
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        """Store zero-points [rows, groups] as nearly as the type can, for scales that are settled; {} if fixed."""

    @abstractmethod
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        """Find parameters of spans of weights [spans, span], each array [spans, …]."""

    @abstractmethod
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        """Weights float32 [rows, columns] of a quantised matrix, in the C reference's order of operations."""

    def grouped(self, matrix: Tensor) -> Tensor:
        """View a matrix [rows, columns] as [rows, groups, group]."""
        return matrix.unflatten(-1, (-1, self.group))

    def fixed(self, arrays: Mapping[str, Tensor]) -> Arrays:
        """Stored parameters that no method learns once they are found, beside scales and zero-points."""
        return {}

    @property
    def shared(self) -> frozenset[str]:
        """Stored parameters, by name, that are the same in all spans of a matrix."""
        return frozenset()

    def with_codebooks(self, codebooks: Tensor) -> Grid:
        """Return the grid of a model that brings its own codebooks, int8; this one where the type has none."""
        return self

    def with_factor_for(self, weight: Tensor) -> Grid:
        """Return the grid of a matrix, float32 [rows, columns], in a file that has a factor for it.

        This one where the type knows no factors.
        """
        return self

    def of(self, arrays: Mapping[str, Tensor]) -> Grid:
        """Return the grid of a matrix that is there already, whose stored parameters may bring a factor."""
        return self

    def levels(self, tensor: QuantizedTensor) -> Tensor:
        """What scales multiply once the zero-point is taken off it: [rows, groups, group], codes where uniform."""
        return self.grouped(tensor.arrays["q"])

    def neighbours(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The two codes that a weight can be rounded to.

        Args:
            weight: float32 [rows, columns].
            arrays: stored parameters, and codes `q` if there are any: the first of the two where weights are rounded
                together.

        Returns:
            The lower code [rows, columns]; its level, a whole number of 8 bits; and the distance of the upper code's
            level, also one, or None where it is always 1. Of weights that are rounded together, the first code and the
            second, whose distance may be negative.
        """
        scale, zero = self.scale(arrays)[..., None], self.zero(arrays)[..., None]
        lower = (self.grouped(weight) / scale + zero).floor_().clamp_(0, self.highest - 1).flatten(-2)
        code = lower.to(torch.uint8)
        return code, code, None

    def pick(self, code: Tensor, gap: Tensor | None, up: Tensor) -> Tensor:
        """Pick one of the two codes of every weight.

        Args:
            code: the lower ones, [rows, columns].
            gap: the distances that `neighbours` gives with them.
            up: where the upper one is picked, bool of the same shape.
        """
        return code + up

    def rounder(self, arrays: Arrays) -> Rounder:
        """Return what rounds the columns of a span, whose parameters are given, one after the other."""
        return _AffineRounder(self, arrays)

    def encode(self, weight: Tensor, arrays: Mapping[str, Tensor], importance: Tensor | None = None) -> Tensor:
        """Nearest codes [rows, columns] of weights [rows, columns] for stored parameters.

        Args:
            weight: float32.
            arrays: the parameters.
            importance: weights of the squared errors, float32 [columns], which count where weights are rounded
                together; None means all equal.
        """
        scale, zero = self.scale(arrays)[..., None], self.zero(arrays)[..., None]
        return (self.grouped(weight) / scale + zero).round().clamp(0, self.highest).to(torch.uint8).flatten(-2)

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Round to nearest, with parameters from `search`."""
        arrays = self.search(weight, importance)
        return self.assemble(self.encode(weight, arrays, importance), arrays)

    def assemble(self, q: Tensor, arrays: Mapping[str, Tensor]) -> QuantizedTensor:
        """Put codes [rows, columns] and stored parameters together."""
        return QuantizedTensor(self.type, {"q": q, **arrays})

    @torch.no_grad()
    def search(self, weight: Tensor, importance: Tensor | None = None) -> Arrays:
        """Find the stored parameters that minimise the weighted squared error of rounding to nearest.

        Args:
            weight: float32 [rows, columns].
            importance: non-negative weights of the squared errors, float32 [columns]; None means all equal.
        """
        rows, columns = weight.shape
        spans, per_row = weight.reshape(-1, self.span), columns // self.span
        h = torch.ones(columns, device=weight.device) if importance is None else importance.float()
        h = (h / h.mean().clamp_min(1e-30)).clamp_min(1e-6).view(per_row, self.span)
        rows_at_once = max(1, _SEARCH_CHUNK // columns) * per_row
        found = [self._search_spans(chunk, h.repeat(len(chunk) // per_row, 1)) for chunk in spans.split(rows_at_once)]
        return {key: torch.cat([f[key] for f in found]).reshape(rows, -1) for key in found[0]}

    def stored(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """Give a tensor as the type stores it, if that differs from how methods see it."""
        return tensor

    def relax(self, arrays: Mapping[str, Tensor]) -> Arrays:
        """Give the variables, all 0, that fine tuning moves: scales in log space, zero-points as they are."""
        scale = self.scale(arrays)
        relaxed = {"scale": torch.zeros_like(scale)}
        return relaxed | ({"zero": torch.zeros_like(scale)} if self.learns_zero else {})

    def realise(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scales and zero-points that the type would store for relaxed variables, differentiable (straight-through)."""
        wanted = self.scale(arrays) * relaxed["scale"].exp()
        scale = through(wanted, self.scale(self.settle_scale(wanted.detach())))
        if "zero" not in relaxed:
            return scale, self.zero(arrays)
        zero = self.zero(arrays) + relaxed["zero"]
        stored = self.settle_scale(wanted.detach()) | self.settle_zero(zero.detach(), scale.detach())
        return scale, through(zero, self.zero(stored))

    @torch.no_grad()
    def tighten(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Arrays:
        """Store what `realise` gives."""
        scale, zero = self.realise(relaxed, arrays)
        return self.settle_scale(scale) | self.settle_zero(zero, scale)


Part = tuple[Grid, range]
"""Columns of a span, and the grid that they have for themselves; its arrays are among those of the span's grid."""


class Rounder(ABC):
    """Rounds the columns of a span in order, for methods that move columns which are not rounded yet.

    Attributes:
        arrays: the span's parameters, some of which may be chosen on the way.
    """

    arrays: Arrays

    @abstractmethod
    def __call__(self, column: int, block: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Round a column.

        Args:
            column: which, counted from the span's first.
            block: the span as it is now, transposed: float32 [span, rows].
            factor: upper Cholesky factor of the inverse second moments of its columns, float32 [span, span].

        Returns:
            Codes and values, float32 [rows] each.
        """


def importance_of(factor: Tensor) -> Tensor:
    """Weights of the squared errors of columns that are rounded in order, float32 [columns].

    Args:
        factor: upper Cholesky factor of their inverse second moments, float32 [columns, columns].
    """
    return 1.0 / factor.diagonal().square()


class _AffineRounder(Rounder):
    def __init__(self, grid: Grid, arrays: Arrays) -> None:
        self.arrays = arrays
        self._highest = grid.highest
        # column by column: transposed, a column is contiguous
        self._scale, self._zero = (
            p.repeat_interleave(grid.group, 1).T.contiguous() for p in (grid.scale(arrays), grid.zero(arrays))
        )

    def __call__(self, column: int, block: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self._scale[column], self._zero[column]
        q = torch.div(block[column], scale).add_(zero).round_().clamp_(0, self._highest)
        return q, scale * (q - zero)


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value` (straight-through estimator)."""
    return value + (rounded - value).detach()
