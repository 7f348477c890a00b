"""Weights from integers and learned scales: scale·(q - zero), with a backward pass that keeps the integers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Affine(torch.autograd.Function):
    """scale·(q - zero) of grouped codes or levels [rows, groups, group]; scale and zero [rows, groups]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Compute weights, float32 [rows, groups, group]."""
        ctx.save_for_backward(q, scale, zero)
        return torch.sub(q, zero[..., None]).mul_(scale[..., None])  # a new tensor: levels may be float32 themselves

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        """Give gradients of scale and zero."""
        q, scale, zero = ctx.saved_tensors
        total = gradient.sum(-1)
        return None, torch.linalg.vecdot(gradient, q.float()) - zero * total, -scale * total
