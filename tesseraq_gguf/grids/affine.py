"""Affine grids of the TSQ types: value d·(q - z) in groups of 64, d an unsigned 8-bit float, z an 8-bit fixed-point
number.

Matrices are [rows, columns]; grouped matrices are [rows, groups, 64]; parameters are [rows, groups]. All arithmetic
is float32 and, where it makes bytes, equal to the C reference bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.quantized import QuantizedTensor

GROUP = 64
"""Weights that share one d and one z."""

_EXPONENT_OFFSET = 103 << 3
"""E5M3 code of d plus this, shifted left by 20, is the float32 bit pattern of d."""

_SEARCH_CHUNK = 1 << 21
"""Weights whose parameters are searched at a time: bounds the memory of the candidates."""


def scale_code(d: Tensor) -> Tensor:
    """Round positive scales (float32, any shape) to the nearest E5M3 code (uint8), clamped to the range 2^-24 … 240."""
    bits = d.float().contiguous().view(torch.int32)
    return (((bits + (1 << 19)) >> 20) - _EXPONENT_OFFSET).clamp(0, 255).to(torch.uint8)


def decode_scale(code: Tensor) -> Tensor:
    """E5M3 codes (uint8) to float32 scales: 2^(e-24)·(1 + m/8)."""
    return ((code.to(torch.int32) << 20) + (103 << 23)).view(torch.float32)


@dataclass(frozen=True)
class AffineGrid:
    """The grid d·(q - z) with `bits`-bit codes q.

    Attributes:
        type: name of the tensor type whose grid this is.
        bits: bits of a code; q runs from 0 to 2^bits - 1.
    """

    type: str
    bits: int

    @property
    def highest(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

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

    def grouped(self, matrix: Tensor) -> Tensor:
        """View a matrix [rows, columns] as [rows, groups, 64]."""
        return matrix.unflatten(-1, (-1, GROUP))

    def encode(self, weight: Tensor, d: Tensor, z: Tensor) -> Tensor:
        """Nearest codes of weights.

        Args:
            weight: float32 [rows, columns].
            d: decoded scales, float32 [rows, groups].
            z: decoded zero-points, float32 [rows, groups].

        Returns:
            uint8 [rows, columns].
        """
        q = (self.grouped(weight) / d[..., None] + z[..., None]).round().clamp(0, self.highest)
        return q.to(torch.uint8).flatten(-2)

    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        """Weights float32 [rows, columns] of a quantised matrix, in the C reference's order of operations."""
        q, d, z = tensor.arrays["q"], decode_scale(tensor.arrays["d"]), self.decode_zero(tensor.arrays["z"])
        return (d[..., None] * (self.grouped(q).float() - z[..., None])).flatten(-2)

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Round to nearest, with parameters from `search`."""
        d, z = self.search(weight, importance)
        return self.assemble(self.encode(weight, decode_scale(d), self.decode_zero(z)), d, z)

    def assemble(self, q: Tensor, d: Tensor, z: Tensor) -> QuantizedTensor:
        """Name codes and parameter codes (all uint8) as this type's arrays."""
        return QuantizedTensor(self.type, {"q": q, "d": d, "z": z})

    @torch.no_grad()
    def search(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the d and z of every group that minimise the weighted squared error of rounding to nearest.

        Starts from the group's range shrunk from both ends, refines each candidate by alternating nearest codes and
        the weighted
        least-squares d and z, puts d and z on their 8-bit grids, and keeps the best.

        Args:
            weight: float32 [rows, columns].
            importance: non-negative weights of the squared errors, float32 [columns]; None means all equal.

        Returns:
            Codes of d and z, uint8 [rows, groups] each.
        """
        groups = self.grouped(weight).reshape(-1, GROUP)
        per_row = weight.shape[-1] // GROUP
        h = torch.ones(weight.shape[-1], device=weight.device) if importance is None else importance.float()
        h = (h / h.mean().clamp_min(1e-30)).clamp_min(1e-6).view(per_row, GROUP)
        d, z = [], []
        rows_at_once = max(1, _SEARCH_CHUNK // GROUP // per_row) * per_row
        for chunk in groups.split(rows_at_once):
            best = self._search_groups(chunk, h.repeat(len(chunk) // per_row, 1))
            d.append(best[0])
            z.append(best[1])
        shape = (weight.shape[0], per_row)
        return torch.cat(d).view(shape), torch.cat(z).view(shape)

    def _search_groups(self, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        low, high = w.amin(1), w.amax(1)
        best_error = torch.full_like(low, torch.inf)
        best_d = torch.zeros_like(low, dtype=torch.uint8)
        best_z = self.zero_code(torch.zeros_like(low))
        hw, total_h = h * w, h.sum(1)
        total_hw = hw.sum(1)
        shrinks = [(a, b) for a in (1.0, 0.8, 0.6, 0.45) for b in (1.0, 0.8, 0.6, 0.45)]
        for shrink_low, shrink_high in shrinks:
            lo, hi = low * shrink_low, high * shrink_high
            d = ((hi - lo) / self.highest).clamp_min(2.0**-24)
            z = -lo / d
            for _ in range(3):
                q = (w / d[:, None] + z[:, None]).round_().clamp_(0, self.highest)
                hq = h * q
                mean_q, mean_w = hq.sum(1) / total_h, total_hw / total_h
                variance = (hq * q).sum(1) / total_h - mean_q**2
                covariance = (hq * w).sum(1) / total_h - mean_q * mean_w
                slope = covariance / variance.clamp_min(1e-12)
                moved = (variance > 1e-6) & (slope > 0)
                d = torch.where(moved, slope, d).clamp_min(2.0**-24)
                z = torch.where(moved, mean_q - mean_w / d, z)
            nearest = scale_code(d)
            for code in (
                nearest,
                (nearest.int() + 1).clamp_max(255).to(torch.uint8),
                (nearest.int() - 1).clamp_min(0).to(torch.uint8),
            ):
                scale = decode_scale(code)
                q = (w / scale[:, None] + z[:, None]).round_().clamp_(0, self.highest)
                zero = self.zero_code((h * q).sum(1) / total_h - total_hw / total_h / scale)
                offset = self.decode_zero(zero)[:, None]
                q = (w / scale[:, None] + offset).round_().clamp_(0, self.highest)
                error = (h * (scale[:, None] * (q - offset) - w) ** 2).sum(1)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_d = torch.where(better, code, best_d)
                best_z = torch.where(better, zero, best_z)
        return best_d, best_z


TSQ2 = AffineGrid("tsq2", 2)
TSQ3 = AffineGrid("tsq3", 3)
TSQ4 = AffineGrid("tsq4", 4)
