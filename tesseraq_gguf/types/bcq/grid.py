"""Grids of the BCQ types: groups of 64 with an 8-bit float d, and codewords out of codebooks of 16 for every 8 weights.

A value is d·c, with c = codebooks[s][q]: an index q for each weight, a selector s for every 8, E5M3 codes of d for
every 64. Codewords are integers from -31 to 31, ascending in a codebook, but not evenly spaced: what methods do in
steps of one code goes from codeword to codeword here.

Whatever makes bytes equals the C reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.grid import Arrays, Grid, Rounder
from tesseraq_gguf.types.quantized import QuantizedTensor

_TRIED = (0, -1, 1, 2)
"""E5M3 codes of d that a search tries, counted from the one that brings the largest weight to the largest codeword."""


_SPANS = 1024
"""Spans searched at a time: what is made of them on the way stays in a processor's cache."""


def universal() -> Tensor:
    """The universal codebooks, int8 [8, 16]."""
    return torch.from_numpy(bcq.UNIVERSAL.copy())


def nearest_indices(codebooks: Tensor) -> Tensor:
    """Index of the codeword nearest to x by floor(2x) + 64, int64 [8, 128].

    Halfway between two codewords is a multiple of one half, so the floor loses nothing; there the upper one counts.
    """
    half = torch.arange(-64, 64, device=codebooks.device)
    borders = codebooks[:, 1:].to(torch.int64) + codebooks[:, :-1]
    return (half[:, None] >= borders[:, None, :]).sum(2)


def halves(x: Tensor) -> Tensor:
    """floor(2x) + 64 within 0 … 127, int64."""
    return (2 * x).floor_().clamp_(-64, 63).add_(64).to(torch.int64)


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """The grid d·codebooks[s][q]. Its arrays: `d` uint8 [rows, groups], `s` uint8 [rows, groups·8], and `c`.

    Attributes:
        codebooks: int8 [8, 16].
        own: whether these are a model's own; then they are among the arrays, int8 [rows, 128], the same in every row.
    """

    codebooks: Tensor = field(default_factory=universal, compare=False)
    own: bool = False

    @property
    @override
    def uniform(self) -> bool:
        return False

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return e5m3.decode_tensor(arrays["d"])

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(arrays["d"], dtype=torch.float32)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return {"d": e5m3.encode_tensor(scale)}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {}

    @override
    def fixed(self, arrays: Mapping[str, Tensor]) -> Arrays:
        return {key: arrays[key] for key in ("s", "c") if key in arrays}

    @property
    @override
    def shared(self) -> frozenset[str]:
        return frozenset({"c"})

    @override
    def levels(self, tensor: QuantizedTensor) -> Tensor:
        return self.grouped(_codewords(tensor.arrays, self._of(tensor.arrays)))

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        return (self.levels(tensor) * self.scale(tensor.arrays)[..., None]).flatten(-2)

    @override
    def encode(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        scale = self.scale(arrays)[..., None]
        half = halves(self.grouped(weight) / scale).flatten(-2)
        selector = arrays["s"].to(torch.int64).repeat_interleave(bcq.GROUP, -1)
        return nearest_indices(self._of(arrays).to(weight.device))[selector, half].to(torch.uint8)

    @override
    def neighbours(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        position = (self.grouped(weight) / self.scale(arrays)[..., None]).flatten(-2)
        table = self._of(arrays).to(weight.device).float()
        rows = table[arrays["s"].to(torch.int64)].unsqueeze(-2)  # [rows, groups of 8, 1, 16]
        above = (position.unflatten(-1, (-1, bcq.GROUP, 1)) >= rows).sum(-1).sub_(1).clamp_(0, bcq.LEVELS - 2)
        rows = rows.expand(*above.shape, bcq.LEVELS)
        lower = rows.gather(-1, above[..., None])[..., 0]
        gap = rows.gather(-1, above[..., None] + 1)[..., 0] - lower
        return above.to(torch.uint8).flatten(-2), lower.to(torch.int8).flatten(-2), gap.to(torch.uint8).flatten(-2)

    @override
    def rounder(self, arrays: Arrays) -> Rounder:
        return _CodebookRounder(arrays, self._of(arrays))

    @override
    def search(self, weight: Tensor, importance: Tensor | None = None) -> Arrays:
        found = super().search(weight, importance)
        if self.own:
            found["c"] = self.codebooks.reshape(1, -1).repeat(len(weight), 1).to(weight.device)
        return found

    @override
    def tighten(self, relaxed: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Arrays:
        return super().tighten(relaxed, arrays) | self.fixed(arrays)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        codebooks = self.codebooks.to(weight.device)
        near = codebooks.float().gather(1, nearest_indices(codebooks))  # [8, 128]
        parts = zip(weight.split(_SPANS), importance.split(_SPANS), strict=True)
        found = [self._search_some(w, h, near) for w, h in parts]
        return {key: torch.cat([f[key] for f in found]) for key in found[0]}

    def _search_some(self, w: Tensor, h: Tensor, near: Tensor) -> Arrays:
        middle = e5m3.encode_tensor(w.abs().amax(1) / bcq.LARGEST).int()
        best = torch.full_like(w[:, 0], torch.inf)
        best_d = middle.to(torch.uint8)
        best_s = torch.zeros(len(w), self.group // bcq.GROUP, dtype=torch.uint8, device=w.device)
        for step in _TRIED:
            code = (middle + step).clamp(0, 255).to(torch.uint8)
            scale = e5m3.decode_tensor(code)
            scaled = w / scale[:, None]
            error, selector = select(scaled, h, near)
            total = error.sum(1) * scale.square()
            better = total < best
            best, best_d = torch.where(better, total, best), torch.where(better, code, best_d)
            best_s = torch.where(better[:, None], selector, best_s)
        return {"d": best_d[:, None], "s": best_s}

    @override
    def with_codebooks(self, codebooks: Tensor) -> CodebookGrid:
        return CodebookGrid(
            self.type, self.bits, self.group, self.span, self.learns_zero, codebooks.to(torch.int8), True
        )

    def _of(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Codebooks of a matrix: what is stored with it, for a tensor explains itself."""
        return arrays["c"][0].view(bcq.CODEBOOKS, bcq.LEVELS) if "c" in arrays else universal().to(arrays["d"].device)


def select(scaled: Tensor, importance: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The best codebook for every 8 neighbouring numbers.

    Args:
        scaled: numbers in units of d, float32 [spans, columns].
        importance: weights of their squared errors, of the same shape.
        near: the nearest codeword by `halves`, float32 [8, 128].

    Returns:
        The weighted squared error, float32 [spans, columns / 8], and the selector, uint8 of the same shape.
    """
    half = halves(scaled)
    errors = [
        row.take(half).sub_(scaled).square_().mul_(importance).unflatten(1, (-1, bcq.GROUP)).sum(2) for row in near
    ]
    best, selector = torch.stack(errors).min(0)
    return best, selector.to(torch.uint8)


def _codewords(arrays: Mapping[str, Tensor], codebooks: Tensor) -> Tensor:
    """Codewords float32 [rows, columns]."""
    selector = arrays["s"].to(torch.int64).repeat_interleave(bcq.GROUP, -1)
    return codebooks.to(selector.device).flatten().float()[selector * bcq.LEVELS + arrays["q"]]


class _CodebookRounder(Rounder):
    """Rounds columns in order; the codebook of 8 columns is chosen when the first of them comes up, as it is then."""

    def __init__(self, arrays: Arrays, codebooks: Tensor) -> None:
        self.arrays = dict(arrays)
        self._scale = e5m3.decode_tensor(arrays["d"])[:, 0]
        self._codebooks = codebooks.to(arrays["d"].device)
        self._indices = nearest_indices(self._codebooks)
        self._near = self._codebooks.float().gather(1, self._indices)
        self._levels = self._codebooks.float()

    def __call__(self, column: int, block: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        group, inside = divmod(column, bcq.GROUP)
        if inside == 0:
            ahead = (block[column : column + bcq.GROUP] / self._scale).T
            _, chosen = select(ahead, importance[column : column + bcq.GROUP].expand_as(ahead), self._near)
            self.arrays["s"] = self.arrays["s"].clone()
            self.arrays["s"][:, group] = chosen[:, 0]
            self._selector = chosen[:, 0].to(torch.int64)
        q = self._indices[self._selector, halves(block[column] / self._scale)]
        return q.float(), self._scale * self._levels[self._selector, q]


def codebook(type: str) -> CodebookGrid:
    """Return the grid of a BCQ type with the universal codebooks."""
    return CodebookGrid(type, bits=4, group=bcq.BLOCK, span=bcq.BLOCK, learns_zero=False)


BCQ4, BCQ4_A4 = map(codebook, ("bcq4", "bcq4_a4"))
