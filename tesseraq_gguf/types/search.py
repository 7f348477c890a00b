"""Fits of scale and zero-point to groups of weights, as if both could be any number. Pure functions.

Groups are [groups, group]; `h` weighs the squared errors, of the same shape. Each function yields candidates: start
from the range of the group shrunk in several ways, then alternate nearest codes and the weighted least-squares fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SMALLEST = 2.0**-24
"""Smallest scale that all types can hold."""

_ROUNDS = 3
"""Alternations of codes and fit."""


def shrinks(bits: int) -> tuple[float, ...]:
    """Shares of the range to start from; the fewer the levels, the more there is to gain by clipping."""
    return (1.0, 0.8, 0.6, 0.45) if bits == 2 else (1.0, 0.85, 0.7)


def fine_shrinks(bits: int) -> tuple[float, ...]:
    """The same, but many levels want ranges that differ little, for what each does to the rounding."""
    return (1.03, 1.015, 1.0, 0.98, 0.955, 0.92) if bits >= 5 else shrinks(bits)


def asymmetric(w: Tensor, h: Tensor, highest: int, shares: tuple[float, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield candidates (scale > 0, zero), [groups] each, for codes 0 … highest."""
    low, high = w.amin(1), w.amax(1)
    total = h.sum(1)
    hw = h * w
    mean_w = hw.sum(1) / total
    ranges = [(low * shrink_low, high * shrink_high) for shrink_low in shares for shrink_high in shares]
    # zero-points reach only so far: a group of one sign, or of one value, needs 0 in its range
    ranges.append((low.clamp_max(0), high.clamp_min(0)))
    for lo, hi in ranges:
        scale = ((hi - lo) / highest).clamp_min(SMALLEST)
        zero = -lo / scale
        for _ in range(_ROUNDS):
            q = (w / scale[:, None] + zero[:, None]).round_().clamp_(0, highest)
            hq = h * q
            mean_q = hq.sum(1) / total
            variance = (hq * q).sum(1) / total - mean_q**2
            covariance = (hq * w).sum(1) / total - mean_q * mean_w
            slope = covariance / variance.clamp_min(1e-12)
            moved = (variance > 1e-6) & (slope > 0)
            scale = torch.where(moved, slope, scale).clamp_min(SMALLEST)
            zero = torch.where(moved, mean_q - mean_w / scale, zero)
        yield scale, zero


def symmetric(
    w: Tensor, h: Tensor, nearest: Callable[[Tensor], Tensor], ends: tuple[float, float], shares: tuple[float, ...]
) -> Iterator[Tensor]:
    """Yield candidate scales [groups] of either sign.

    Args:
        w: groups of weights.
        h: weights of their squared errors.
        nearest: gives the nearest levels, for weights in units of their scales.
        ends: the lowest level and the highest.
        shares: of the range, to start from.
    """
    hw = h * w
    low, high = ends
    for sign in (1.0, -1.0):
        signed = w * sign
        # the range reaches further on one side: the scale must serve both
        reach = torch.maximum(signed.amax(1) / high, signed.amin(1) / low).clamp_min(SMALLEST)
        near = (signed.abs().amax(1) / max(-low, high)).clamp_min(SMALLEST)
        for start in (reach, near):
            for share in shares:
                scale = (start * share).clamp_min(SMALLEST) * sign
                for _ in range(_ROUNDS):
                    p = nearest(w / scale[:, None])
                    energy = (h * p * p).sum(1)
                    fit = (hw * p).sum(1) / energy.clamp_min(1e-30)
                    scale = torch.where((energy > 0) & (fit * sign > SMALLEST), fit, scale)
                yield scale
