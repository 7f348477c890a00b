"""Grids of the TSQ types: groups of 64, scale d an unsigned 8-bit float, zero-point an 8-bit fixed-point number.

Whatever makes bytes equals the C reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types import e5m3, search
from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.quantized import QuantizedTensor

GROUP = 64
"""Weights that share one d and one z."""

_FITS = 2
"""Fits whose neighbours on the grid are tried."""


@dataclass(frozen=True)
class TsqGrid(Grid):
    """The grid d·(q - z). Its arrays: `d` and `z`, uint8 [rows, groups]."""

    @property
    def zero_step(self) -> float:
        """Distance of two neighbouring zero-points."""
        return 2.0 ** (self.bits - 7)

    @property
    def zero_lowest(self) -> float:
        """Smallest zero-point; its code is 0."""
        return -(2.0 ** (self.bits - 1))

    def zero_code(self, z: Tensor) -> Tensor:
        """Round zero-points (float32, any shape) to the nearest code (uint8), clamped to the range."""
        return ((z - self.zero_lowest) / self.zero_step).round().clamp(0, 255).to(torch.uint8)

    def decode_zero(self, code: Tensor) -> Tensor:
        """Zero-point codes (uint8) to float32."""
        return code.float() * self.zero_step + self.zero_lowest

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return e5m3.decode_tensor(arrays["d"])

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.decode_zero(arrays["z"])

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return {"d": e5m3.encode_tensor(scale)}

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return {"z": self.zero_code(zero)}

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        scale, zero = self.scale(tensor.arrays)[..., None], self.zero(tensor.arrays)[..., None]
        return (scale * (self.grouped(tensor.arrays["q"]).float() - zero)).flatten(-2)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        w, h = weight, importance
        total_h, total_hw = h.sum(1), (h * w).sum(1)
        mean_w = total_hw / total_h
        # the best fits by what a type with free parameters would make of them ...
        fits = []
        for scale, zero in search.asymmetric(w, h, self.highest, search.shrinks(self.bits)):
            offset = zero.clamp(self.zero_lowest, self.zero_lowest + 255 * self.zero_step)
            fits.append((self._error(w, h, scale, offset), scale, zero))
        errors = torch.stack([error for error, _, _ in fits])
        chosen = errors.topk(_FITS, 0, largest=False).indices
        scales, zeros = torch.stack([s for _, s, _ in fits]), torch.stack([z for _, _, z in fits])
        # ... then their neighbours on the type's own grid
        best_error = torch.full_like(total_h, torch.inf)
        best_d = torch.zeros_like(total_h, dtype=torch.uint8)
        best_z = self.zero_code(torch.zeros_like(total_h))
        for rank in chosen:
            nearest = e5m3.encode_tensor(scales.gather(0, rank[None])[0]).int()
            z = zeros.gather(0, rank[None])[0]
            for code in (nearest, nearest + 1, nearest - 1):
                code = code.clamp(0, 255).to(torch.uint8)
                scale = e5m3.decode_tensor(code)
                q = (w / scale[:, None] + z[:, None]).round_().clamp_(0, self.highest)
                stored = self.zero_code((h * q).sum(1) / total_h - mean_w / scale)
                error = self._error(w, h, scale, self.decode_zero(stored))
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_d = torch.where(better, code, best_d)
                best_z = torch.where(better, stored, best_z)
        return {"d": best_d[:, None], "z": best_z[:, None]}

    def _error(self, w: Tensor, h: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        q = (w / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, self.highest)
        return q.sub_(zero[:, None]).mul_(scale[:, None]).sub_(w).square_().mul_(h).sum(1)


def with_bits(bits: int) -> TsqGrid:
    """Return the grid of the TSQ type with `bits`-bit codes."""
    return TsqGrid(type=f"tsq{bits}", bits=bits, group=GROUP, span=GROUP, learns_zero=True)


TSQ2, TSQ3, TSQ4 = map(with_bits, (2, 3, 4))
