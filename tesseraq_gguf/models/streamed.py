"""Matrices that are in memory while they multiply and no longer: those of experts, where a block has hundreds.

A streamed matrix is a linear layer whose weight is read whenever it is asked for. Gradients pass through it to what it
is fed; on the way down it is read again. Another weight can be put in its place, as a function that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Read = Callable[[], Tensor]
"""Gives a matrix [out, in], float32 on the device."""


class StreamedLinear(nn.Linear):
    """A linear layer without bias whose weight is read when it is used.

    Args:
        shape: [out, in].
        read: reads its weight.

    Attributes:
        given: makes a weight to use in place of its own; None uses its own.
    """

    def __init__(self, shape: tuple[int, int], read: Read) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None)
        self._read, self.given = read, None  # type: Read, Read | None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, [out, in] float32, read anew."""
        return (self.given or self._read)()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]."""
        weight = self.weight
        if weight.requires_grad or not (torch.is_grad_enabled() and x.requires_grad):
            return linear(x, weight)
        return _Product.apply(x, weight, self.given or self._read)  # type: ignore[no-untyped-call,no-any-return]


class _Product(torch.autograd.Function):
    """x·Wᵀ, of which W is not kept for the way down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, read: Read) -> Tensor:
        ctx.read, ctx.dtype = read, x.dtype
        return linear(x, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient.float() @ ctx.read()).to(ctx.dtype), None, None


@contextmanager
def given(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Put other weights, by module name, in the places of streamed matrices, each made when it is used.

    Yields:
        The names of those that have another.
    """
    put = {n: m for n, m in module.named_modules() if isinstance(m, StreamedLinear) and n in weights} if weights else {}
    before = {name: layer.given for name, layer in put.items()}
    for name, layer in put.items():
        layer.given = lambda name=name: weights[name]  # type: ignore[misc]
    try:
        yield set(put)
    finally:
        for name, layer in put.items():
            layer.given = before[name]


class Made(Mapping[str, Tensor]):
    """Tensors by name, some of which are made whenever they are asked for.

    Args:
        held: those that are there.
        made: what makes the others.
    """

    def __init__(self, held: Mapping[str, Tensor], made: Mapping[str, Read]) -> None:
        self._held, self._made = held, made

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]() if name in self._made else self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._made or name in self._held

    def __iter__(self) -> Iterator[str]:
        yield from self._held
        yield from self._made

    def __len__(self) -> int:
        return len(self._held) + len(self._made)
