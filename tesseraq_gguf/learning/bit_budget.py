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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import torch
from torch import Tensor

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.column_order import InputStatistics, likeness, order_of, score
from tesseraq_gguf.learning.palette import Palette, undominated, with_order
from tesseraq_gguf.learning.palette import rounded as painted
from tesseraq_gguf.learning.sensitivity import Passed
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import GROUPED, Grid, MatrixGrids
from tesseraq_gguf.types.quantized import QuantizedTensor

_MOST_UNITS = 200_000
"""Sizes that the dynamic programme tells apart; where there are more, sizes are rounded up."""


_JUDGED = 128
"""Rows of a matrix that are rounded in all types, before the whole is in those that are worth their bytes."""


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


def order_for(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """Return the order of columns that a matrix alone would get where its type wants one, int64 [in]."""
    if grid.places is None:
        return torch.arange(weight.shape[1], device=weight.device)
    scores = score([weight], InputStatistics(importance, importance), "error")
    return order_of(scores, likeness([weight]), None, *grid.places)


@dataclass
class CostMeter:
    """Measures what types cost while the sensitivity is measured.

    Attributes:
        candidates: types to try for each matrix, by checkpoint name; matrices not named are not measured.
        granularity: what shares a scale.
        palette: where matrices are kept as they were rounded; None keeps none, and costs are of rounding to nearest.
        scaled: matrices that can have a factor in the file, by checkpoint name.
        costs: of the blocks' matrices in types that are worth their bytes, by checkpoint name.
        final: final hidden states, float32 [samples, length, hidden].
        bottom: gradient below the first block, of the same shape.
    """

    candidates: Mapping[str, Sequence[str]]
    granularity: str
    palette: Palette | None = None
    scaled: Collection[str] = frozenset()
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    bottom: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def _grids(self) -> MatrixGrids:
        return MatrixGrids(self.granularity, scaled=self.scaled)

    def block(self, block: LoadedBlock, passed: Passed) -> None:
        """Take a block with what its matrices were fed and felt.

        Raises:
            NotFiniteError: a cost is not finite: none could be told from another.
        """
        rounded: dict[tuple[str, str], QuantizedTensor] = {}
        for name, module in block.matrices().items():
            full_name = f"{block.prefix}{name}.weight"
            if full_name in self.candidates and name in passed:
                matrix = Watched(module.weight.detach(), *passed[name])
                # which types are worth it, some rows tell
                judged = matrix if self.palette is None else matrix.some(_JUDGED)
                costs = costs_of(judged, self.candidates[full_name], self._grids, full_name)
                if self.palette is not None:
                    costs = self._painted(full_name, matrix, costs, rounded)
                numbers = torch.tensor(list(costs.values()))
                check_finite({full_name: numbers}, "the costs of its types", TAKE_ANOTHER)
                self.costs[full_name] = costs
        if self.palette is not None:
            self.palette.keep(f"block-{block.index:04d}", rounded)

    def _painted(
        self, name: str, matrix: Watched, costs: Mapping[str, float], rounded: dict[tuple[str, str], QuantizedTensor]
    ) -> dict[str, float]:
        """Round a matrix well in the types that are worth it, and return what these cost then."""
        sizes = {type: tensor_type(type).bits_per_weight for type in costs}
        # experts of a stack have one type: none is left out for some of them
        worthy = list(costs) if stack_of(name) else undominated(costs, sizes)
        moment = matrix.fed.T @ matrix.fed / len(matrix.fed)
        found = {}
        for type in worthy:
            if tensor_type(type).is_float:
                found[type] = costs[type]
                continue
            grid = self._grids.of(name, matrix.weight, type)
            order, value = order_for(matrix.weight, matrix.importance, grid), torch.empty_like(matrix.weight)
            tensor = painted(matrix.weight[:, order], moment[order][:, order], grid)
            value[:, order] = grid.dequantize(tensor)
            found[type] = matrix.cost(value)
            rounded[name, type] = QuantizedTensor(tensor.type, {key: a.cpu() for key, a in tensor.arrays.items()})
            if grid.ordered:
                key, kept = with_order(name, type, order.cpu())
                rounded[key] = kept
        return found

    def ends(self, final: Tensor, bottom: Tensor) -> None:
        """Keep final hidden states and the gradient below the first block."""
        self.final, self.bottom = final, bottom
