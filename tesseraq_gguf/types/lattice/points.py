"""The points of a lattice type, and which of them is nearest. Functions of tensors alone.

Numbers are in units of the scale. `x` are weights, `h` the weights of their squared errors, `s` signs: 1 or -1. Signs
are chosen first: a point has magnitudes only, and the weights that it stands for are s·x, which is negative where a
sign had to be taken that is not the weight's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SCORES = 1 << 18
"""Distances computed at a time: on the way they stay in a processor's cache."""

_SCORES_ON_GPU = 1 << 26


@dataclass(frozen=True, eq=False)
class Points:
    """Points of a type.

    Attributes:
        magnitudes: float32 [points, weights].
        even: whether signs of neighbours that stand together hold an even number of minuses.
    """

    magnitudes: Tensor
    even: bool

    @property
    def weights(self) -> int:
        """Weights of a point."""
        return self.magnitudes.shape[1]

    @cached_property
    def lowest(self) -> float:
        """Smallest magnitude."""
        return float(self.magnitudes.min())

    @cached_property
    def largest(self) -> float:
        """Largest magnitude."""
        return float(self.magnitudes.max())

    @cached_property
    def _table(self) -> Tensor:
        """What [h, h·s·x] is multiplied by for Σ h·(s·x - p)² - Σ h·x² of every point, float32 [2·weights, points]."""
        return torch.cat([self.magnitudes.T.square(), -2 * self.magnitudes.T]).contiguous()

    def to(self, device: torch.device) -> Points:
        """Return the points on a device."""
        return self if self.magnitudes.device == device else Points(self.magnitudes.to(device), self.even)

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

    def least(self, x: Tensor, h: Tensor) -> Tensor:
        """Σ h·(x - p)² - Σ h·x² of the nearest point, float32 [...]; x, h [..., weights], x with signs taken off."""
        return torch.cat([scores.amin(1) for scores in self._scores(x, h)]).view(x.shape[:-1])

    def nearest(self, x: Tensor, h: Tensor) -> Tensor:
        """Magnitudes of the nearest point, float32 [..., weights]; x, h of the same shape, x with signs taken off."""
        index = torch.cat([scores.min(1).indices for scores in self._scores(x, h)])
        return self.magnitudes[index].view(x.shape)

    def few(self, x: Tensor, h: Tensor, s: Tensor, count: int) -> Tensor:
        """Near signed points, float32 [n, 2·count, weights]: the nearest of signs `s`, and of the next best signs.

        Args:
            x: weights, float32 [n, weights].
            h: of the same shape.
            s: signs of the same shape. The next best have the same parity, where signs have one.
            count: of points of the same signs.
        """
        t = _flipped(s, h * s * x * x.abs().clamp_min(self.lowest), 2 if self.even else 1, None)
        return torch.cat([signs[:, None] * self._nearest_few(signs * x, h, count) for signs in (s, t)], 1)

    def _nearest_few(self, x: Tensor, h: Tensor, count: int) -> Tensor:
        """Magnitudes of the nearest points, float32 [n, count, weights]; x, h [n, weights], x with signs taken off."""
        index = [scores.topk(count, 1, largest=False).indices for scores in self._scores(x, h)]
        return self.magnitudes[torch.cat(index)]

    def other(self, x: Tensor, h: Tensor, levels: Tensor) -> Tensor:
        """The nearest signed point but one.

        Where signs hold a parity, it has the same number of minuses, even or odd.

        Args:
            x: weights, float32 [n, weights].
            h: of the same shape.
            levels: the one, a signed point, float32 of the same shape.

        Returns:
            A signed point of the same shape.
        """
        s = torch.where(levels < 0, -1.0, 1.0)
        same_signs = self._second(s * x, h, levels.abs())
        # the cheapest flips as if the point stayed, then the point that suits them
        t = _flipped(s, h * s * x * levels.abs(), 2 if self.even else 1, None)
        candidates = torch.stack([s * same_signs, t * self.nearest(t * x, h)])
        error = (h * (candidates - x).square()).sum(-1)
        return torch.where((error[1] < error[0])[:, None], candidates[1], candidates[0])

    def _second(self, x: Tensor, h: Tensor, magnitudes: Tensor) -> Tensor:
        """Magnitudes of the nearest point but `magnitudes`, all [n, weights]."""
        found = []
        first = 0
        for scores in self._scores(x, h):
            rows = magnitudes[first : first + len(scores)]
            own = (self.magnitudes.square().sum(1) - 2 * rows @ self.magnitudes.T).argmin(1)
            found.append(scores.scatter_(1, own[:, None], torch.inf).min(1).indices)
            first += len(scores)
        return self.magnitudes[torch.cat(found)]

    def _scores(self, x: Tensor, h: Tensor) -> Iterator[Tensor]:
        """Σ h·(x - p)² - Σ h·x² of every point, float32 [some, points], for all [weights] in order.

        Each takes the place of the one before.
        """
        flat = torch.cat([h, h * x], -1).view(-1, 2 * self.weights)
        parts = flat.split((_SCORES_ON_GPU if flat.is_cuda else _SCORES) // len(self.magnitudes))
        scores = flat.new_empty(len(parts[0]), len(self.magnitudes))
        return (torch.mm(part, self._table, out=scores[: len(part)]) for part in parts)


def _flipped(s: Tensor, cost: Tensor, count: int, where: Tensor | None) -> Tensor:
    """Signs [..., n] with the `count` cheapest of them turned, in the rows `where` says so."""
    cheapest = cost.topk(count, -1, largest=False).indices if count > 1 else cost.argmin(-1, keepdim=True)
    turned = -s.gather(-1, cheapest)
    if where is not None:
        turned = torch.where(where[..., None], turned, -turned)
    return s.scatter(-1, cheapest, turned)
