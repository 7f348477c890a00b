"""Grids of the BCQ types: groups of 64 with an 8-bit float d, and codewords out of one of a few codebooks.

A value is d·c, with c = codebooks[s][q]: an index q for each weight, a selector s for every 8 of BCQ4 and every 16 of
BCQ2, E5M3 codes of d for every 64. Codewords are integers from -31 to 31, ascending in a codebook, but not evenly
spaced: what methods do in steps of one code goes from codeword to codeword here.

Whatever makes bytes equals the C reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types import e5m3
from tesseraq_gguf.types.bcq.packer import BLOCK, shape_of
from tesseraq_gguf.types.bcq.packer import universal as universal_codebooks
from tesseraq_gguf.types.facts import Codebooks
from tesseraq_gguf.types.grid import Arrays, Rounder, importance_of
from tesseraq_gguf.types.levels import CodewordGrid, halves, nearest_indices

FEW = 4
"""Levels of a codebook up to which outliers are left out, as clipping them serves the others."""


def tried(levels: int) -> tuple[int, ...]:
    """E5M3 codes of d that a search tries, counted from the one that brings the largest weight to the largest codeword.

    The fewer the levels, the more there is to gain by clipping.
    """
    return (0, *range(-8, 0), 1, 2) if levels <= FEW else (0, -1, 1, 2)


_SPANS = 1024
"""Spans searched at a time: what is made of them on the way stays in a processor's cache."""


def universal(type: str) -> Tensor:
    """The universal codebooks of a type, int8 [codebooks, levels]."""
    return torch.from_numpy(universal_codebooks(shape_of(type)).copy())


@dataclass(frozen=True)
class CodebookGrid(CodewordGrid):
    """The grid d·codebooks[s][q]. Its arrays: `d` uint8 [rows, groups], `s` uint8 [rows, selectors], and `c`.

    Attributes:
        codebooks: int8 [codebooks, levels].
        own: whether these are a model's own; then they are among the arrays, int8 [rows, codebooks · levels], the same
            in every row.
    """

    codebooks: Tensor = field(compare=False)
    own: bool = False

    @property
    def shape(self) -> Codebooks:
        """What the codebooks are."""
        return shape_of(self.type)

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return e5m3.decode_tensor(arrays["d"])

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return {"d": e5m3.encode_tensor(scale)}

    @override
    def fixed(self, arrays: Mapping[str, Tensor]) -> Arrays:
        return {key: arrays[key] for key in ("s", "c") if key in arrays}

    @property
    @override
    def shared(self) -> frozenset[str]:
        return frozenset({"c"})

    @override
    def encode(self, weight: Tensor, arrays: Mapping[str, Tensor], importance: Tensor | None = None) -> Tensor:
        scale = self.scale(arrays)[..., None]
        half = halves(self.grouped(weight) / scale).flatten(-2)
        selector = arrays["s"].to(torch.int64).repeat_interleave(self.shape.group, -1)
        return nearest_indices(self._of(arrays).to(weight.device))[selector, half].to(torch.uint8)

    @override
    def neighbours(self, weight: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        position = (self.grouped(weight) / self.scale(arrays)[..., None]).flatten(-2)
        table = self._of(arrays).to(weight.device).float()
        rows = table[arrays["s"].to(torch.int64)].unsqueeze(-2)  # [rows, selectors, 1, levels]
        above = (position.unflatten(-1, (-1, self.shape.group, 1)) >= rows).sum(-1).sub_(1)
        above = above.clamp_(0, self.shape.levels - 2)
        rows = rows.expand(*above.shape, self.shape.levels)
        lower = rows.gather(-1, above[..., None])[..., 0]
        gap = rows.gather(-1, above[..., None] + 1)[..., 0] - lower
        return above.to(torch.uint8).flatten(-2), lower.to(torch.int8).flatten(-2), gap.to(torch.uint8).flatten(-2)

    @override
    def rounder(self, arrays: Arrays) -> Rounder:
        return _CodebookRounder(arrays, self._of(arrays), self.shape.group)

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
        near = codebooks.float().gather(1, nearest_indices(codebooks))  # [codebooks, 128]
        parts = zip(weight.split(_SPANS), importance.split(_SPANS), strict=True)
        found = [self._search_some(w, h, near) for w, h in parts]
        return {key: torch.cat([f[key] for f in found]) for key in found[0]}

    def _search_some(self, w: Tensor, h: Tensor, near: Tensor) -> Arrays:
        middle = e5m3.encode_tensor(w.abs().amax(1) / self.shape.largest).int()
        best = torch.full_like(w[:, 0], torch.inf)
        best_d = middle.to(torch.uint8)
        best_s = torch.zeros(len(w), self.group // self.shape.group, dtype=torch.uint8, device=w.device)
        for step in tried(self.shape.levels):
            code = (middle + step).clamp(0, 255).to(torch.uint8)
            scale = e5m3.decode_tensor(code)
            scaled = w / scale[:, None]
            error, selector = select(scaled, h, near, self.shape.group)
            total = error.sum(1) * scale.square()
            better = total < best
            best, best_d = torch.where(better, total, best), torch.where(better, code, best_d)
            best_s = torch.where(better[:, None], selector, best_s)
        return {"d": best_d[:, None], "s": best_s}

    @override
    def with_codebooks(self, codebooks: Tensor) -> CodebookGrid:
        return replace(self, codebooks=codebooks.to(torch.int8), own=True)

    def _of(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Codebooks of a matrix: what is stored with it, for a tensor explains itself."""
        return arrays["c"][0].view(self.shape.shape) if "c" in arrays else universal(self.type).to(arrays["d"].device)

    @override
    def codewords(self, arrays: Mapping[str, Tensor]) -> Tensor:
        selector = arrays["s"].to(torch.int64).repeat_interleave(self.shape.group, -1)
        table = self._of(arrays).to(selector.device).flatten().float()
        return table[selector * self.shape.levels + arrays["q"]]


def select(scaled: Tensor, importance: Tensor, near: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The best codebook for every `group` neighbouring numbers.

    Args:
        scaled: numbers in units of d, float32 [spans, columns].
        importance: weights of their squared errors, of the same shape.
        near: the nearest codeword by `halves`, float32 [codebooks, 128].
        group: how many neighbours share a codebook.

    Returns:
        The weighted squared error, float32 [spans, columns / group], and the selector, uint8 of the same shape.
    """
    half = halves(scaled)
    weighted = (row.take(half).sub_(scaled).square_().mul_(importance) for row in near)
    errors = [each.unflatten(1, (-1, group)).sum(2) for each in weighted]
    best, selector = torch.stack(errors).min(0)
    return best, selector.to(torch.uint8)


class _CodebookRounder(Rounder):
    """Rounds columns in order; the codebook of a few is chosen when the first of them comes up, as it is then."""

    def __init__(self, arrays: Arrays, codebooks: Tensor, group: int) -> None:
        self._group = group
        self.arrays = dict(arrays)
        self._scale = e5m3.decode_tensor(arrays["d"])[:, 0]
        self._codebooks = codebooks.to(arrays["d"].device)
        self._indices = nearest_indices(self._codebooks)
        self._near = self._codebooks.float().gather(1, self._indices)
        self._levels = self._codebooks.float()

    def __call__(self, column: int, block: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        group, inside = divmod(column, self._group)
        if inside == 0:
            columns = slice(column, column + self._group)
            ahead = (block[columns] / self._scale).T
            importance = importance_of(factor)[columns].expand_as(ahead)
            _, chosen = select(ahead, importance, self._near, self._group)
            self.arrays["s"] = self.arrays["s"].clone()
            self.arrays["s"][:, group] = chosen[:, 0]
            self._selector = chosen[:, 0].to(torch.int64)
        q = self._indices[self._selector, halves(block[column] / self._scale)]
        return q.float(), self._scale * self._levels[self._selector, q]


def codebook(type: str) -> CodebookGrid:
    """Return the grid of a BCQ type with the universal codebooks."""
    bits = (shape_of(type).levels - 1).bit_length()
    return CodebookGrid(type, bits, group=BLOCK, span=BLOCK, learns_zero=False, codebooks=universal(type))


BCQ2, BCQ4, BCQ4_A4 = map(codebook, ("bcq2", "bcq4", "bcq4_a4"))
