"""Grid of PTQ1_61 (after PTQ1.61, arXiv 2502.13179): blocks of 128 weights, 24 of them of 4 bits, 104 of a sign alone.

    salient, the first 24 of a block:  s·(q - 7.5),  q from 0 to 15
    binary, the other 104:             2d·(q - 0.5), q from 0 to 1: d or -d

with E5M3 codes of d and s for every block. Which channels stand where in a block, an order of the columns decides
(`column_order.py`); the grid knows nothing of it.

Both kinds are affine, so to methods this is a grid with groups of 8 weights, 3 and 13 of which share a scale: variables
are kept for d and s alone. What is uneven is how far codes reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.grid import Arrays, Grid, Part, through
from tesseraq_gguf.types.quantized import QuantizedTensor

BLOCK = 128
"""Weights of a block."""

SALIENT = 24
"""Weights of 4 bits in a block, its first."""

_TRIED = range(-8, 3)
"""E5M3 codes of s that a search tries, counted from the one that brings the largest weight to the largest level."""


@dataclass(frozen=True)
class _PartGrid(Grid):
    """One kind of weights: value = scale·(q - middle), symmetric around 0.

    Attributes:
        name: of its array, uint8 [rows, blocks].
    """

    name: str

    @property
    def middle(self) -> float:
        """The zero-point: half of the largest code."""
        return self.highest / 2

    @property
    def step(self) -> int:
        """Distance of two values in units of what is stored: 2 for signs, whose values are one unit from 0."""
        return 2 if self.bits == 1 else 1

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return e5m3.decode_tensor(arrays[self.name]) * self.step

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(arrays[self.name], self.middle, dtype=torch.float32)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return {self.name: e5m3.encode_tensor(scale / self.step)}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {}

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        q = self.grouped(tensor.arrays["q"]).float() - self.middle
        return (self.scale(tensor.arrays)[..., None] * q).flatten(-2)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = weight, importance
        if self.bits == 1:  # the error is a parabola in d: its vertex, rounded, is best
            return {self.name: e5m3.encode_tensor((h * w.abs()).sum(1) / h.sum(1))[:, None]}
        nearest = e5m3.encode_tensor(w.abs().amax(1) / self.middle).int()
        best_error = torch.full_like(w[:, 0], torch.inf)
        best = nearest.to(torch.uint8)
        for step in _TRIED:
            code = (nearest + step).clamp(0, 255).to(torch.uint8)
            scale = e5m3.decode_tensor(code)[:, None]
            value = (w / scale).add_(self.middle).round_().clamp_(0, self.highest).sub_(self.middle).mul_(scale)
            error = value.sub_(w).square_().mul_(h).sum(1)
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, code, best)
        return {self.name: best[:, None]}


@dataclass(frozen=True)
class Ptq161Grid(Grid):
    """The grid of both kinds. Its arrays: `d` and `s`, uint8 [rows, blocks].

    Attributes:
        salient: weights of a block that have 4 bits, its first; those of the type are 24. A multiple of `group`.
    """

    salient: int = SALIENT

    @property
    @override
    def uniform(self) -> bool:
        return False

    @property
    @override
    def places(self) -> tuple[int, int] | None:
        return BLOCK, self.salient

    @property
    @override
    def parts(self) -> tuple[Part, ...]:
        # signs err most: rounded first, what they err by is fed into the weights of 4 bits, which can take it
        salient, binary = self.salient, BLOCK - self.salient
        return (
            (_PartGrid(self.type, 1, binary, binary, False, "d"), range(salient, BLOCK)),
            (_PartGrid(self.type, self.bits, salient, salient, False, "s"), range(salient)),
        )

    @override
    def spread(self, variables: Tensor) -> Tensor:
        s, d = variables.unflatten(-1, (-1, 2)).unsqueeze(-1).unbind(-2)
        return torch.cat(
            [s.expand(*s.shape[:-1], self._firsts), d.expand(*d.shape[:-1], BLOCK // self.group - self._firsts)], -1
        ).flatten(-2)

    @override
    def gather(self, of_groups: Tensor) -> Tensor:
        blocks = of_groups.unflatten(-1, (-1, BLOCK // self.group))
        return blocks[..., [0, self._firsts]].flatten(-2)

    @property
    def _firsts(self) -> int:
        """Groups of salient weights in a block."""
        return self.salient // self.group

    def _both(self, salient: Tensor, binary: Tensor) -> Tensor:
        """Numbers of blocks, [rows, blocks] each, for groups: [rows, groups]."""
        return self.spread(torch.stack([salient, binary], -1).flatten(-2))

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self._both(e5m3.decode_tensor(arrays["s"]), 2 * e5m3.decode_tensor(arrays["d"]))

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        like = torch.ones_like(arrays["d"], dtype=torch.float32)
        return self._both(7.5 * like, 0.5 * like)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        s, d = self.gather(scale).unflatten(-1, (-1, 2)).unbind(-1)
        return {"d": e5m3.encode_tensor(d / 2), "s": e5m3.encode_tensor(s)}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {}

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        scale, zero = self.scale(tensor.arrays)[..., None], self.zero(tensor.arrays)[..., None]
        return (scale * (self.grouped(tensor.arrays["q"]).float() - zero)).flatten(-2)

    def _reach(self, columns: int, device: torch.device) -> Tensor:
        """Largest code of every column, float32 [columns]."""
        reach = torch.ones(BLOCK, device=device)
        reach[: self.salient] = self.highest
        return reach.repeat(columns // BLOCK)

    @override
    def neighbours(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        lower = torch.minimum(self._position(weight, arrays).floor_().clamp_(0), self._below_reach(weight))
        code = lower.to(torch.uint8)
        return code, code, None

    def _below_reach(self, weight: Tensor) -> Tensor:
        return self._reach(weight.shape[-1], weight.device) - 1

    def _position(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        scale, zero = self.scale(arrays)[..., None], self.zero(arrays)[..., None]
        return (self.grouped(weight) / scale + zero).flatten(-2)

    @override
    def encode(self, weight: Tensor, arrays: Mapping[str, Tensor], importance: Tensor | None = None) -> Tensor:
        nearest = self._position(weight, arrays).round_().clamp_(0)
        return torch.minimum(nearest, self._reach(weight.shape[-1], weight.device)).to(torch.uint8)

    @override
    def relax(self, arrays: Mapping[str, Tensor]) -> Arrays:
        return {key: torch.zeros_like(arrays[key], dtype=torch.float32) for key in ("d", "s")}

    @override
    def realise(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        d, s = (moved(arrays[key], relaxed[key]) for key in ("d", "s"))
        return self._both(s, 2 * d), self.zero(arrays)

    @override
    @torch.no_grad()
    def tighten(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Arrays:
        return {key: e5m3.encode_tensor(e5m3.decode_tensor(arrays[key]) * relaxed[key].exp()) for key in ("d", "s")}

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        found: Arrays = {}
        for part, columns in self.parts:
            inside = slice(columns.start, columns.stop)
            found |= part._search_spans(weight[:, inside], importance[:, inside])
        return {"d": found["d"], "s": found["s"]}


def moved(code: Tensor, relaxed: Tensor) -> Tensor:
    """A scale, E5M3 uint8, times exp(relaxed), as it would be stored, with a straight-through gradient."""
    wanted = e5m3.decode_tensor(code) * relaxed.exp()
    return through(wanted, e5m3.decode_tensor(e5m3.encode_tensor(wanted.detach())))


def with_salient(count: int) -> Ptq161Grid:
    """Return a grid with so many salient weights in a block; with 24 it is that of the type."""
    return Ptq161Grid("ptq1_61", 4, gcd(count, BLOCK - count), BLOCK, False, count)


PTQ1_61 = with_salient(SALIENT)
