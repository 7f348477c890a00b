"""The points of a lattice type, and which of them is nearest. Functions of tensors alone.

Numbers are in units of the scale. `x` are weights, `h` the weights of their squared errors, `s` signs: 1 or -1. Where a
point has magnitudes only, signs are chosen first, and the weights that it stands for are s·x, which is negative where a
sign had to be taken that is not the weight's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self, override

_SCORES = 1 << 18
"""Distances computed at a time: on the way they stay in a processor's cache."""

_SCORES_ON_GPU = 1 << 26


@dataclass(frozen=True, eq=False)
class Points:
    """Points of a type, with their signs.

    Attributes:
        levels: float32 [points, weights].
    """

    levels: Tensor

    @property
    def weights(self) -> int:
        """Weights of a point."""
        return self.levels.shape[1]

    @cached_property
    def lowest(self) -> float:
        """Smallest magnitude of a level."""
        return float(self.levels.abs().min())

    @cached_property
    def largest(self) -> float:
        """Largest magnitude of a level."""
        return float(self.levels.abs().max())

    @property
    def alike(self) -> float:
        """How many times larger the largest level is than one that all weights of a point can have."""
        return 1.0

    @cached_property
    def _table(self) -> Tensor:
        """What [h, h·x] is multiplied by for Σ h·(x - p)² - Σ h·x² of every point, float32 [2·weights, points]."""
        return torch.cat([self.levels.T.square(), -2 * self.levels.T]).contiguous()

    def to(self, device: torch.device) -> Self:
        """Return the points on a device."""
        return self if self.levels.device == device else replace(self, levels=self.levels.to(device))

    def signs(self, x: Tensor, h: Tensor, odd: Tensor | None = None) -> Tensor:
        """The signs that are chosen before the point: none of these, so 1 everywhere, float32 of the shape of `x`."""
        return torch.ones_like(x)

    def least(self, x: Tensor, h: Tensor) -> Tensor:
        """Σ h·(x - p)² - Σ h·x² of the nearest point, float32 [...]; x, h [..., weights], x with signs taken off."""
        return torch.cat([scores.amin(1) for scores in self._scores(x, h)]).view(x.shape[:-1])

    def nearest(self, x: Tensor, h: Tensor) -> Tensor:
        """The nearest point, float32 [..., weights]; x, h of the same shape, x with signs taken off."""
        index = torch.cat([scores.min(1).indices for scores in self._scores(x, h)])
        return self.levels[index].view(x.shape)

    def few(self, x: Tensor, h: Tensor, s: Tensor, count: int) -> Tensor:
        """Near signed points, float32 [n, count, weights].

        Args:
            x: weights, float32 [n, weights].
            h: of the same shape.
            s: signs of the same shape, as `signs` gives them.
            count: how many, even.
        """
        return self._nearest_few(x, h, count)

    def other(self, x: Tensor, h: Tensor, levels: Tensor) -> Tensor:
        """The nearest signed point but one.

        Args:
            x: weights, float32 [n, weights].
            h: of the same shape.
            levels: the one, a signed point, float32 of the same shape.

        Returns:
            A signed point of the same shape.
        """
        return self._second(x, h, levels)

    def _nearest_few(self, x: Tensor, h: Tensor, count: int) -> Tensor:
        """The nearest points, float32 [n, count, weights]; x, h [n, weights], x with signs taken off."""
        index = [scores.topk(count, 1, largest=False).indices for scores in self._scores(x, h)]
        return self.levels[torch.cat(index)]

    def _second(self, x: Tensor, h: Tensor, points: Tensor) -> Tensor:
        """The nearest point but that of `points`, all [n, weights]."""
        found = []
        first = 0
        for scores in self._scores(x, h):
            rows = points[first : first + len(scores)]
            own = (self.levels.square().sum(1) - 2 * rows @ self.levels.T).argmin(1)
            found.append(scores.scatter_(1, own[:, None], torch.inf).min(1).indices)
            first += len(scores)
        return self.levels[torch.cat(found)]

    def _scores(self, x: Tensor, h: Tensor) -> Iterator[Tensor]:
        """Σ h·(x - p)² - Σ h·x² of every point, float32 [some, points], for all [weights] in order.

        Each takes the place of the one before.
        """
        flat = torch.cat([h, h * x], -1).view(-1, 2 * self.weights)
        parts = flat.split((_SCORES_ON_GPU if flat.is_cuda else _SCORES) // len(self.levels))
        scores = flat.new_empty(len(parts[0]), len(self.levels))
        return (torch.mm(part, self._table, out=scores[: len(part)]) for part in parts)


@dataclass(frozen=True, eq=False)
class Magnitudes(Points):
    """Points of levels that are not negative, whose weights have signs of their own.

    Attributes:
        even: whether signs of neighbours that stand together hold an even number of minuses.
    """

    even: bool

    @property
    @override
    def alike(self) -> float:
        return self.largest / self.lowest

    @override
    def signs(self, x: Tensor, h: Tensor, odd: Tensor | None = None) -> Tensor:
        """The signs of weights that stand together, float32 [..., n]; where they hold a parity, one may differ.

        Args:
            x: float32 [..., n].
            h: of the same shape.
            odd: whether the number of minuses is odd, bool [...]; None means nowhere. Only where signs have a parity.
        """
        s = torch.where(x < 0, -1.0, 1.0)
        if not self.even:
            return s
        wrong = (x < 0).sum(-1) % 2 == 1
        if odd is not None:
            wrong ^= odd
        return _flipped(s, h * x.abs() * x.abs().clamp_min(self.lowest), 1, wrong)

    @override
    def few(self, x: Tensor, h: Tensor, s: Tensor, count: int) -> Tensor:
        """Near signed points, float32 [n, count, weights]: half of them have the signs `s`, half the next best.

        The next best have the same parity, where signs have one.
        """
        t = _flipped(s, h * s * x * x.abs().clamp_min(self.lowest), 2 if self.even else 1, None)
        return torch.cat([signs[:, None] * self._nearest_few(signs * x, h, count // 2) for signs in (s, t)], 1)

    @override
    def other(self, x: Tensor, h: Tensor, levels: Tensor) -> Tensor:
        """The nearest signed point but one; where signs hold a parity, with the same number of minuses, even or odd."""
        s = torch.where(levels < 0, -1.0, 1.0)
        same_signs = self._second(s * x, h, levels.abs())
        # the cheapest flips as if the point stayed, then the point that suits them
        t = _flipped(s, h * s * x * levels.abs(), 2 if self.even else 1, None)
        candidates = torch.stack([s * same_signs, t * self.nearest(t * x, h)])
        error = (h * (candidates - x).square()).sum(-1)
        return torch.where((error[1] < error[0])[:, None], candidates[1], candidates[0])


def _flipped(s: Tensor, cost: Tensor, count: int, where: Tensor | None) -> Tensor:
    """Signs [..., n] with the `count` cheapest of them turned, in the rows `where` says so."""
    cheapest = cost.topk(count, -1, largest=False).indices if count > 1 else cost.argmin(-1, keepdim=True)
    turned = -s.gather(-1, cheapest)
    if where is not None:
        turned = torch.where(where[..., None], turned, -turned)
    return s.scatter(-1, cheapest, turned)
