"""A palette: matrices rounded once in each type that they may have, so that any choice among these can be tried.

What a type costs a matrix is measured with all others as they are (`bit_budget.py`). At few bits costs do not add up:
what one matrix loses, another feels. So a choice is run as a whole, and mended where other choices, found by counting
some kinds of matrices for more or less, end nearer to the model's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tesseraq_gguf.methods.gptq import compensate
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import Grid
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor, column_order, load_tensors, save_tensors

_DAMPING = 0.01

_STEP = 2.0
"""Factor by which a group's costs are counted for more or less."""

_GAIN = 0.99
"""Share of the divergence that a choice may leave to be taken for a better one."""

Choice = Mapping[str, str]
"""Types by checkpoint name."""


@dataclass
class Palette:
    """Rounded matrices on disk.

    Attributes:
        folder: where they are kept; it is there.
        kept: types of what is kept, by checkpoint name.
    """

    folder: Path
    kept: dict[str, dict[str, Path]] = field(default_factory=dict)

    def keep(self, file: str, tensors: Mapping[tuple[str, str], QuantizedTensor]) -> None:
        """Keep matrices, and orders of their columns, by checkpoint name and type, in a file of that name."""
        place = self.folder / f"{file}.safetensors"
        save_tensors(place, {f"{type}/{name}": tensor for (name, type), tensor in tensors.items()})
        for name, type in tensors:
            self.kept.setdefault(name, {})[type] = place

    def of(self, choice: Choice, names: Iterable[str]) -> dict[str, QuantizedTensor]:
        """Return matrices in the types of a choice, with orders of their columns, as far as they are kept so."""
        found: dict[str, QuantizedTensor] = {}
        loaded: dict[Path, dict[str, QuantizedTensor]] = {}
        for name in names:
            type = choice.get(name, "")
            place = self.kept.get(name, {}).get(type)
            if place is None:
                continue
            if place not in loaded:
                loaded[place] = load_tensors(place)[0]
            for kept in (name, _order_of(name)):
                if (tensor := loaded[place].get(f"{type}/{kept}")) is not None:
                    found[kept] = tensor
        return found


def rounded(weight: Tensor, moment: Tensor, grid: Grid) -> QuantizedTensor:
    """Round a matrix as well as takes seconds: by GPTQ, or to nearest where eight bits leave nothing to mend.

    Args:
        weight: float32 [out, in], columns in the order of the type.
        moment: mean x·xᵀ of what it is fed, float32 [in, in].
        grid: of the type.
    """
    if tensor_type(grid.type).plain:
        return grid.quantize(weight, moment.diagonal())
    return compensate(weight, moment, grid, _DAMPING).tensor


def undominated(costs: Mapping[str, float], sizes: Mapping[str, float]) -> list[str]:
    """Return the types that no smaller or equal one costs less than, from the smallest on."""
    found: list[str] = []
    for type in sorted(costs, key=lambda t: (sizes[t], costs[t])):
        if not found or costs[type] < costs[found[-1]]:
            found.append(type)
    return found


def with_order(name: str, type: str, order: Tensor) -> tuple[tuple[str, str], QuantizedTensor]:
    """Return what a palette keeps of an order of columns, int64 [in]."""
    return (_order_of(name), type), column_order(order)


def _order_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}{ORDER}"


@dataclass(frozen=True)
class Mended:
    """What came of trying choices.

    Attributes:
        choice: the best.
        before: the divergence that the first one leaves, in nats per token.
        after: that of the best.
        tried: choices that were run.
    """

    choice: Choice
    before: float
    after: float
    tried: int


def mend(
    groups: Mapping[str, Iterable[str]],
    choose: Callable[[Mapping[str, float]], Choice],
    measure: Callable[[Choice], float],
    tries: int,
) -> Mended:
    """Try choices that count groups of matrices for more or less, and keep what ends nearer to the model's answers.

    Args:
        groups: names of matrices by group; a matrix may be in several.
        choose: gives the choice within the budget for factors of costs, by name of matrix.
        measure: gives the divergence that a choice leaves.
        tries: how many choices may be run.
    """
    best = choose({})
    measured = {_key(best): measure(best)}
    before = after = measured[_key(best)]
    factors: dict[str, float] = {}
    for group in groups.values():
        for step in (_STEP, 1 / _STEP):
            moved = False
            while len(measured) < tries:
                wanted = factors | {name: factors.get(name, 1.0) * step for name in group}
                choice = choose(wanted)
                if _key(choice) in measured:
                    break
                measured[_key(choice)] = found = measure(choice)
                if found >= _GAIN * after:
                    break
                best, after, factors, moved = choice, found, wanted, True
            if moved:  # what is better for more is not better for less
                break
    return Mended(best, before, after, len(measured))


def _key(choice: Choice) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(choice.items()))
