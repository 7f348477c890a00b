"""Grids of llama.cpp's k-quants: super-blocks of 256 weights with one or two half floats, small integers for groups.

Q2_K, Q4_K, Q5_K: d·sc·q - dmin·m, sc and m of 4 or 6 bits. Q3_K: d·(sc - 32)·(q - 4), sc of 6 bits. Q6_K:
d·(sc - 128)·(q - 32), sc of 8 bits. IQ4_XS: d·(sc - 32)·level, with levels out of a table.
In the terms of every grid: scale = d·sc and zero = dmin·m / scale, or scale = d·(sc - 32) and zero = 4.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types import search
from tesseraq_gguf.types.grid import Arrays
from tesseraq_gguf.types.kquants.packer import SUPER_BLOCK
from tesseraq_gguf.types.levels import EvenGrid, SignedLevelsGrid, TableGrid
from tesseraq_gguf.types.quantized import QuantizedTensor
from tesseraq_gguf.types.stock.grid import half
from tesseraq_gguf.types.stock.packer import IQ4_LEVELS
from tesseraq_gguf.types.super_blocks import SuperBlockGrid

_DIVISORS = (1.0, 0.96, 0.92, 0.88, 0.84)
"""Shares of the largest scale that the largest integer stands for: what is tried when scales settle."""

_REFITS = 3
"""Alternations of codes and parameters in the search."""


@dataclass(frozen=True)
class _KQuantGrid(SuperBlockGrid):
    """What both kinds share.

    Attributes:
        scale_bits: bits of the integers that groups have.
    """

    scale_bits: int

    @property
    def largest(self) -> int:
        """Largest integer of a group."""
        return (1 << self.scale_bits) - 1

    def _by_super_block(self, of_groups: Tensor) -> Tensor:
        return of_groups.unflatten(-1, (-1, self.groups))

    @abstractmethod
    def _refit(self, arrays: Arrays, w: Tensor, h: Tensor) -> Arrays:
        """Fit parameters anew to the codes that `arrays` give to weights [super-blocks, groups, group]."""

    def _refined(self, start: Arrays, w: Tensor, h: Tensor) -> Arrays:
        """Alternate codes and parameters, and keep the best parameters of each super-block."""
        best, best_error = start, self._error(start, w, h)
        trial = start
        for _ in range(_REFITS):
            trial = self._refit(trial, w, h)
            error = self._error(trial, w, h)
            better = (error < best_error)[:, None]
            best = {key: torch.where(better, trial[key], value) for key, value in best.items()}
            best_error = torch.where(better[:, 0], error, best_error)
        return best

    @abstractmethod
    def _error(self, arrays: Arrays, w: Tensor, h: Tensor) -> Tensor:
        """Weighted squared error of each super-block, [super-blocks], of the codes that `arrays` give."""


@dataclass(frozen=True)
class MinGrid(_KQuantGrid):
    """The grid d·sc·q - dmin·m.

    Its arrays: `d` and `dmin`, float16 [rows, super-blocks]; `sc` and `m`, uint8 [rows, groups].
    """

    @property
    @override
    def halves(self) -> tuple[str, ...]:
        return "d", "dmin"

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.of_groups(arrays["d"]) * arrays["sc"].float()

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.of_groups(arrays["dmin"]) * arrays["m"].float() / self.scale(arrays)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        # 1 at least: a group of scale 0 could not be told apart from its zero-point
        d, sc = _settle(self._by_super_block(scale), 1, self.largest)
        return {"d": d, "sc": sc.flatten(-2).to(torch.uint8)}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        dmin, m = _settle(self._by_super_block((zero * scale).clamp_min(0)), 0, self.largest)
        return {"dmin": dmin, "m": m.flatten(-2).to(torch.uint8)}

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        offset = self.of_groups(tensor.arrays["dmin"]) * tensor.arrays["m"].float()
        q = self.grouped(tensor.arrays["q"]).float()
        return (self.scale(tensor.arrays)[..., None] * q - offset[..., None]).flatten(-2)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = self.grouped(weight), self.grouped(importance)
        flat_w, flat_h = w.flatten(0, 1), h.flatten(0, 1)
        best_error = torch.full_like(flat_w[:, 0], torch.inf)
        best_scale, best_zero = torch.ones_like(best_error), torch.zeros_like(best_error)
        for scale, zero in search.asymmetric(flat_w, flat_h, self.highest, search.fine_shrinks(self.bits)):
            zero = zero.clamp_min(0)
            q = (flat_w / scale[:, None] + zero[:, None]).round_().clamp_(0, self.highest)
            # the zero-point cannot be negative, so a group of one sign gets the best scale through 0
            error = (flat_h * (scale[:, None] * (q - zero[:, None]) - flat_w) ** 2).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        scale, offset = best_scale.view(w.shape[:2]), (best_scale * best_zero).view(w.shape[:2])
        return self._refined(self.settle_scale(scale) | self.settle_zero(offset, torch.ones_like(offset)), w, h)

    def _codes(self, arrays: Arrays, w: Tensor) -> Tensor:
        scale, zero = self.scale(arrays)[..., None], self.zero(arrays)[..., None]
        return (w / scale + zero).round_().clamp_(0, self.highest)

    @override
    def _error(self, arrays: Arrays, w: Tensor, h: Tensor) -> Tensor:
        scale, zero = self.scale(arrays)[..., None], self.zero(arrays)[..., None]
        return (h * (scale * (self._codes(arrays, w) - zero) - w) ** 2).sum((1, 2))

    @override
    def _refit(self, arrays: Arrays, w: Tensor, h: Tensor) -> Arrays:
        """For the codes that the parameters give: the best half floats, then the best integers of every group."""
        q = self._codes(arrays, w)
        sc, m = arrays["sc"].float(), arrays["m"].float()
        # least squares of w = d·(sc·q) - dmin·m over the super-block
        a, b = sc[..., None] * q, -m[..., None].expand_as(q)
        aa, ab, bb = (h * a * a).sum((1, 2)), (h * a * b).sum((1, 2)), (h * b * b).sum((1, 2))
        aw, bw = (h * a * w).sum((1, 2)), (h * b * w).sum((1, 2))
        determinant = aa * bb - ab * ab
        solvable = determinant > 1e-9 * aa * bb
        d = torch.where(solvable, (aw * bb - bw * ab) / determinant, aw / aa.clamp_min(1e-30))
        dmin = torch.where(solvable, (bw * aa - aw * ab) / determinant, arrays["dmin"][:, 0].float())
        d = half(torch.where(d > 0, d, arrays["d"][:, 0].float()))[:, None]
        dmin = half(torch.where(dmin > 0, dmin, arrays["dmin"][:, 0].float()))[:, None]
        step, low_step = d.float(), dmin.float()
        # scale and offset of every group for these codes
        total = h.sum(2)
        mean_q, mean_w = (h * q).sum(2) / total, (h * w).sum(2) / total
        variance = (h * q * q).sum(2) / total - mean_q**2
        covariance = (h * q * w).sum(2) / total - mean_q * mean_w
        slope = torch.where(variance > 1e-6, covariance / variance.clamp_min(1e-12), self.scale(arrays))
        sc = (slope / step).round().clamp(1, self.largest)
        offset = sc * step * mean_q - mean_w
        m = (offset / low_step).round().clamp(0, self.largest)
        return {"d": d, "dmin": dmin, "sc": sc.to(torch.uint8), "m": m.to(torch.uint8)}


@dataclass(frozen=True)
class SignedScalesGrid(_KQuantGrid, SignedLevelsGrid):
    """Scales d·(sc - shift), whatever the levels, with a shift of half of the integers that `sc` can be.

    Its arrays: `d`, float16 [rows, super-blocks], `sc`, uint8 [rows, groups].
    """

    @property
    def _shift(self) -> int:
        return 1 << (self.scale_bits - 1)

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.of_groups(arrays["d"]) * (arrays["sc"].float() - self._shift)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        blocks = self._by_super_block(scale)
        # integers reach to -32 but only to 31: the largest scale takes the long side
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        sign = torch.where(largest > 0, -1.0, 1.0)
        d, sc = _settle(blocks * sign, -self._shift, self._shift - 1)
        sc = torch.where(sc == 0, torch.where(blocks * sign < 0, -1.0, 1.0), sc)  # scale 0 has no codes
        return {"d": (d * sign[..., 0]).half(), "sc": (sc + self._shift).flatten(-2).to(torch.uint8)}

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = self.grouped(weight), self.grouped(importance)
        flat_w, flat_h = w.flatten(0, 1), h.flatten(0, 1)
        best_error = torch.full_like(flat_w[:, 0], torch.inf)
        best_scale = torch.ones_like(best_error)
        for scale in search.symmetric(flat_w, flat_h, self.nearest, self.ends, search.fine_shrinks(self.bits)):
            error = (flat_h * (scale[:, None] * self.nearest(flat_w / scale[:, None]) - flat_w) ** 2).sum(1)
            better = error < best_error
            best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
        return self._refined(self.settle_scale(best_scale.view(w.shape[:2])), w, h)

    @override
    def _error(self, arrays: Arrays, w: Tensor, h: Tensor) -> Tensor:
        scale = self.scale(arrays)[..., None]
        return (h * (scale * self.nearest(w / scale) - w) ** 2).sum((1, 2))

    @override
    def _refit(self, arrays: Arrays, w: Tensor, h: Tensor) -> Arrays:
        """For the codes that the parameters give: the best half float, then the best integer of every group."""
        p = self.nearest(w / self.scale(arrays)[..., None])
        a = (arrays["sc"].float() - self._shift)[..., None] * p
        fit = (h * a * w).sum((1, 2)) / (h * a * a).sum((1, 2)).clamp_min(1e-30)
        usable = fit.abs() > search.SMALLEST
        d = half(torch.where(usable, fit, arrays["d"][:, 0].float()))[:, None]
        energy = (h * p * p).sum(2)
        slope = torch.where(energy > 0, (h * p * w).sum(2) / energy.clamp_min(1e-30), self.scale(arrays))
        sc = (slope / d.float()).round().clamp(-self._shift, self._shift - 1)
        sc = torch.where(sc == 0, torch.where(slope * d.float() < 0, -1.0, 1.0), sc)
        return {"d": d, "sc": (sc + self._shift).to(torch.uint8)}


@dataclass(frozen=True)
class SignedGrid(EvenGrid, SignedScalesGrid):
    """The grid d·(sc - shift)·(q - middle)."""


@dataclass(frozen=True)
class SignedTableGrid(TableGrid, SignedScalesGrid):
    """The grid d·(sc - shift)·table[q]."""


def _settle(values: Tensor, lowest: int, largest: int) -> tuple[Tensor, Tensor]:
    """Write values [rows, super-blocks, groups] as half float times integer.

    Returns:
        The half floats [rows, super-blocks] and the integers, float32 of the values' shape.
    """
    reach = torch.maximum(values.amax(-1) / largest, values.amin(-1) / lowest if lowest < 0 else values.amax(-1) * 0)
    best_error = torch.full_like(reach, torch.inf)
    best_d, best_n = half(reach), torch.zeros_like(values)
    for share in _DIVISORS:
        d = half(reach * share)
        n = (values / d.float()[..., None]).round().clamp(lowest, largest)
        error = (d.float()[..., None] * n - values).square().sum(-1)
        better = error < best_error
        best_error, best_d = torch.where(better, error, best_error), torch.where(better, d, best_d)
        best_n = torch.where(better[..., None], n, best_n)
    return best_d, best_n


def with_minimum(type: str, bits: int, group: int, scale_bits: int) -> MinGrid:
    """Return the grid of Q2_K, Q4_K or Q5_K."""
    return MinGrid(type=type, bits=bits, group=group, span=SUPER_BLOCK, learns_zero=True, scale_bits=scale_bits)


def signed(type: str, bits: int, group: int, scale_bits: int) -> SignedGrid:
    """Return the grid of Q3_K or Q6_K."""
    return SignedGrid(
        type=type,
        bits=bits,
        group=group,
        span=SUPER_BLOCK,
        learns_zero=False,
        scale_bits=scale_bits,
        middle=1 << (bits - 1),
    )


Q2_K = with_minimum("q2_k", bits=2, group=16, scale_bits=4)
Q3_K = signed("q3_k", bits=3, group=16, scale_bits=6)
Q4_K = with_minimum("q4_k", bits=4, group=32, scale_bits=6)
Q5_K = with_minimum("q5_k", bits=5, group=32, scale_bits=6)
Q6_K = signed("q6_k", bits=6, group=16, scale_bits=8)
IQ4_XS = SignedTableGrid(
    type="iq4_xs", bits=4, group=32, span=SUPER_BLOCK, learns_zero=False, scale_bits=6, table=IQ4_LEVELS
)
