"""Rounding of activations, simulated: what matrices are fed, and keys and values, on grids of integers.

    x̂ = s·(clamp(round(x / s) + z, 0, 2^b - 1) - z),   s = (high - low) / (2^b - 1),   z = round(-low / s)

with low <= 0 <= high: asymmetric, and 0 stays 0. *Static* ranges are measured once for a tensor on calibration text;
otherwise every token has its own. What kernels make of activations in blocks instead is `kernel_arithmetic.py`. Keys
and values have a range for every token and head, as a cache would store them: after positions were rotated in.
Gradients pass straight through the rounding and stop where a static range clips.

Block reconstruction learns with activations rounded so (LRQ, arXiv 2407.11534, §3.1: W8A8 and W4A8), and
`simulation.py` measures whole models with them. A GGUF runtime rounds activations in its own way: to 8 bits, in groups
of 32 to 256 channels of every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tesseraq_gguf.compute.kernel_arithmetic import BLOCK, codebook_blocks, fp4_blocks, integer_blocks
from tesseraq_gguf.compute.schemes import ActivationScheme, Range
from tesseraq_gguf.types.bcq.grid import BCQ4_A4
from tesseraq_gguf.types.grid import through
from tesseraq_gguf.types.grids import OwnCodebooks


@dataclass(frozen=True)
class ActivationRounding:
    """A scheme with the ranges of one block.

    Attributes:
        scheme: what is rounded.
        ranges: static ranges by module name, for a static scheme.
        codebooks: those of the model, for a scheme with codebooks.
    """

    scheme: ActivationScheme
    ranges: Mapping[str, Range] = field(default_factory=dict)
    codebooks: OwnCodebooks = field(default_factory=dict)

    def feed(self, name: str, x: Tensor) -> Tensor:
        """Round what a matrix is fed, [..., in]; `name` is its module's.

        What a matrix that has no static range is fed stays, and what has no whole number of blocks.
        """
        if self.scheme.bits is None or (self.scheme.static and name not in self.ranges):
            return x
        if self.scheme.static:
            low, high = (torch.tensor(bound, device=x.device) for bound in self.ranges[name])
            return round_between(x, low, high, self.scheme.bits)
        if self.scheme.form == "range":
            return round_tokens(x, self.scheme.bits)
        if x.shape[-1] % BLOCK:
            return x
        return through(x, self._in_blocks(x.detach().float(), self.scheme.bits).to(x.dtype))

    def _in_blocks(self, x: Tensor, bits: int) -> Tensor:
        if self.scheme.form == "codebooks":
            return codebook_blocks(x, self.codebooks.get(BCQ4_A4.shape.layout))
        return fp4_blocks(x) if self.scheme.form == "fp4" else integer_blocks(x, bits)

    def keep(self, x: Tensor) -> Tensor:
        """Round keys or values, [batch, heads, length, channels of a head]."""
        bits = self.scheme.key_value_bits
        return x if bits is None else round_tokens(x, bits)


class RoundedCache:
    """Stands where attention expects its cache of keys and values: it keeps nothing and gives back what it is given.

    Args:
        rounding: rounds them.
    """

    def __init__(self, rounding: ActivationRounding) -> None:
        self._rounding = rounding
        self.used = False

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values rounded; further arguments say where a real cache would put them."""
        self.used = True
        return self._rounding.keep(key), self._rounding.keep(value)


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round each vector along the last dimension in its own range; any float dtype, differentiable."""
    low, high = x.detach().float().aminmax(dim=-1, keepdim=True)
    return round_between(x, low, high, bits)


def round_between(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Round to 2^bits levels from `low` to `high`, or to 0 where these are beyond it.

    Args:
        x: any float dtype and shape; kept.
        low: float32, must broadcast to x.
        high: the same shape as `low`.
        bits: of a level.
    """
    highest = (1 << bits) - 1
    low, high = low.clamp_max(0), high.clamp_min(0)
    # a range of nothing holds zeros alone: any step will do
    step = ((high - low) / highest).clamp_min(torch.finfo(torch.float32).tiny)
    return _Rounded.apply(x, step, torch.round(-low / step), highest)  # type: ignore[no-any-return]


class _Rounded(torch.autograd.Function):
    """step·(clamp(round(x / step) + zero, 0, highest) - zero), passed straight through where it is not clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, highest: int) -> Tensor:
        level = (x.float() / step).round_().add_(zero)
        ctx.save_for_backward((level >= 0) & (level <= highest))
        return level.clamp_(0, highest).sub_(zero).mul_(step).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None
