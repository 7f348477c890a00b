"""Bits where they matter: a tensor type for each matrix, so that all together cost least at a size.

What a matrix costs in a type is what its rounding alone adds to the divergence from the model's answers, to second
order:

    KL(p || p̂) ≈ ½ E[(δᵀ ΔW x)²],     δ = ∂ log p(y) / ∂ (W x),  y drawn from the model itself

per token, with ΔW the error of rounding to nearest in that type (the squared error weighted with E[x²]). It is the
error's length in the metric of the Fisher information (`sensitivity.py`, whose pass measures it), so costs of all
matrices are in one unit, nats per token, and add up as long as they are small. What is learned later has less error,
in all types alike as far as the choice goes. Where a choice is checked as a whole (`palette.py`), matrices are rounded
by GPTQ instead, and costs are of that.

The choice is an exact dynamic programme over bytes: no other assignment of the types costs less and fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import torch
from torch import Tensor

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.palette import Palette, order_for, painted, undominated
from tesseraq_gguf.learning.sensitivity import Passed
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import GROUPED, MatrixGrids

_MOST_UNITS = 200_000
"""Sizes that the dynamic programme tells apart; where there are more, sizes are rounded up."""


_JUDGED = 128
"""Rows of a matrix that its types are judged by, where a palette rounds the whole in those that are chosen."""


@dataclass(frozen=True)
class Item:
    """A matrix whose type is to be chosen.

    Attributes:
        sizes: its bytes in each type that it can have.
        costs: what it costs in each of them, in nats per token.
    """

    sizes: Mapping[str, int]
    costs: Mapping[str, float]

    def scaled(self, factor: float) -> Item:
        """Return it with its costs times a factor."""
        return Item(self.sizes, {type: factor * cost for type, cost in self.costs.items()})


def choose(items: Mapping[str, Item], budget: int) -> dict[str, str]:
    """Choose a type for every item so that the sum of costs is least and the sum of sizes at most the budget.

    Args:
        items: by name.
        budget: bytes.

    Returns:
        Types by name.

    Raises:
        UsageError: the smallest types together are larger than the budget.
    """
    least = sum(min(item.sizes.values()) for item in items.values())
    if least > budget:
        raise UsageError(
            f"the smallest types need {least:,} bytes, and there are {max(0, budget):,}: "
            "give more, or smaller types to choose from"
        )
    if sum(max(item.sizes.values()) for item in items.values()) <= budget:
        return {name: min(item.sizes, key=item.costs.__getitem__) for name, item in items.items()}
    # what every assignment needs is set aside; the rest is counted in units
    extras = {
        name: {type: size - min(item.sizes.values()) for type, size in item.sizes.items()}
        for name, item in items.items()
    }
    room = budget - least
    unit = max(gcd(*(size for e in extras.values() for size in e.values())), -(-room // _MOST_UNITS), 1)
    units = room // unit
    best = np.zeros(units + 1)
    chosen: list[np.ndarray] = []
    for name, item in items.items():
        types = list(item.sizes)
        table = np.full((len(types), units + 1), np.inf)
        for row, type in zip(table, types, strict=True):
            extra = -(-extras[name][type] // unit)
            if extra <= units:
                row[extra:] = best[: units + 1 - extra] + item.costs[type]
        chosen.append(table.argmin(0))
        best = table.min(0)
    left, answer = units, {}
    for (name, item), choice in zip(reversed(list(items.items())), reversed(chosen), strict=True):
        answer[name] = list(item.sizes)[choice[left]]
        left -= -(-extras[name][answer[name]] // unit)
    return {name: answer[name] for name in items}


def bytes_of(shape: Sequence[int], type: str) -> int:
    """Size of a matrix [rows, columns] in a type."""
    kind = tensor_type(type)
    return shape[0] * (shape[1] // kind.block_weights) * kind.block_bytes


@dataclass(frozen=True)
class Watched:
    """A matrix with what it was fed and felt.

    Attributes:
        weight: float32 [out, in].
        fed: what it is fed, float32 [tokens, in].
        felt: δ, the gradient of the answers' log-probability with respect to what it gives, float32 [tokens, out].
    """

    weight: Tensor
    fed: Tensor
    felt: Tensor

    @property
    def importance(self) -> Tensor:
        """Mean squares of what it is fed, float32 [in]."""
        return self.fed.square().mean(0)

    def some(self, rows: int) -> Watched:
        """Return some of its rows, as a matrix of its own."""
        chosen = torch.linspace(0, len(self.weight) - 1, min(rows, len(self.weight)), device=self.weight.device).long()
        return Watched(self.weight[chosen], self.fed, self.felt[:, chosen])

    def cost(self, rounded: Tensor) -> float:
        """What `rounded` [out, in] in its place costs, in nats per token."""
        return 0.5 * float(((self.fed @ (rounded - self.weight).T) * self.felt).sum(1).square().mean())


@torch.no_grad()
def costs_of(
    matrix: Watched, types: Sequence[str], grids: MatrixGrids = GROUPED, name: str = "a matrix"
) -> dict[str, float]:
    """Estimate what a matrix costs in each type when it is rounded to nearest, in nats per token.

    Args:
        matrix: with what it is fed and felt.
        types: which to try.
        grids: gives it its grids.
        name: its checkpoint name.
    """
    weight, importance = matrix.weight, matrix.importance
    costs = {}
    for type in types:
        if tensor_type(type).is_float:  # sixteen bits are taken to cost nothing
            costs[type] = 0.0
            continue
        grid = grids.of(name, weight, type)
        order, rounded = order_for(weight, importance, grid), torch.empty_like(weight)
        rounded[:, order] = grid.dequantize(grid.quantize(weight[:, order], importance[order]))
        costs[type] = matrix.cost(rounded)
    return costs


@dataclass
class CostMeter:
    """Measures what types cost while the sensitivity is measured.

    Attributes:
        candidates: types to try for each matrix, by checkpoint name; matrices not named are not measured.
        grids: gives matrices their grids.
        palette: rounds whole matrices when a choice asks; None rounds none, and costs are of rounding to nearest.
        costs: of the blocks' matrices in types that are worth their bytes, by checkpoint name.
        final: final hidden states, float32 [samples, length, hidden].
        bottom: gradient below the first block, of the same shape.
    """

    candidates: Mapping[str, Sequence[str]]
    grids: MatrixGrids = GROUPED
    palette: Palette | None = None
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    bottom: Tensor = field(default_factory=lambda: torch.empty(0))

    def block(self, block: LoadedBlock, passed: Passed) -> None:
        """Take a block with what its matrices were fed and felt.

        Raises:
            NotFiniteError: a cost is not finite: none could be told from another.
        """
        fed: dict[str, Tensor] = {}
        for name, module in block.matrices().items():
            full_name = f"{block.prefix}{name}.weight"
            if full_name in self.candidates and name in passed:
                matrix = Watched(module.weight.detach(), *passed[name])
                fed[full_name] = matrix.fed
                costs = self._costs(full_name, matrix)
                numbers = torch.tensor(list(costs.values()))
                check_finite({full_name: numbers}, "the costs of its types", TAKE_ANOTHER)
                self.costs[full_name] = costs
        if self.palette is not None:
            self.palette.feed(fed)

    def _costs(self, name: str, matrix: Watched) -> dict[str, float]:
        """What a matrix costs in its types; rounded well, where a palette will round it, in those that are worth it."""
        if self.palette is None:
            return costs_of(matrix, self.candidates[name], self.grids, name)
        some, share = matrix.some(_JUDGED), len(matrix.weight) / min(_JUDGED, len(matrix.weight))
        costs = costs_of(some, self.candidates[name], self.grids, name)
        sizes = {type: tensor_type(type).bits_per_weight for type in costs}
        # experts of a stack have one type: none is left out for some of them
        worthy = list(costs) if stack_of(name) else undominated(costs, sizes)
        # errors of rows have nothing to do with each other: what all cost is what some do, times as many
        return {type: share * self._well(some, type, name) for type in worthy}

    def _well(self, matrix: Watched, type: str, name: str) -> float:
        """What a matrix costs in a type when it is rounded as a palette does."""
        if tensor_type(type).is_float:
            return 0.0
        grid, value = self.grids.of(name, matrix.weight, type), torch.empty_like(matrix.weight)
        tensor, order = painted(matrix.weight, matrix.fed, grid)
        value[:, order] = grid.dequantize(tensor)
        return matrix.cost(value)

    def ends(self, final: Tensor, bottom: Tensor) -> None:
        """Keep final hidden states and the gradient below the first block."""
        self.final, self.bottom = final, bottom
