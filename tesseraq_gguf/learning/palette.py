"""A palette: matrices rounded once in each type that a choice gives them, so that choices can be tried on the model.

What a type costs a matrix is measured with all others as they are (`bit_budget.py`). At few bits costs do not add up:
what one matrix loses, another feels. So a choice is run as a whole, and mended where other choices, found by counting
some kinds of matrices for more or less, end nearer to the model's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tesseraq_gguf.learning.column_order import InputStatistics, likeness, order_of, score
from tesseraq_gguf.methods.gptq import compensate
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import GROUPED, Grid, MatrixGrids
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor, column_order, load_tensors, save_tensors

_DAMPING = 0.01

_STEP = 2.0
"""Factor by which a group's costs are counted for more or less."""

_GAIN = 0.99
"""Share of the divergence that a choice may leave to be taken for a better one."""

Choice = Mapping[str, str]
"""Types by checkpoint name."""


class Palette:
    """Matrices in the types that choices have given them so far, on disk. Each is rounded when a choice first asks.

    Args:
        folder: where they are kept; it is there.
        weight: gives a matrix by checkpoint name, float32 [out, in].
        grids: gives matrices their grids.
    """

    def __init__(self, folder: Path, weight: Callable[[str], Tensor], grids: MatrixGrids = GROUPED) -> None:
        self._folder, self._weight, self._grids = folder, weight, grids
        self._kept: dict[tuple[str, str], Path] = {}
        self._fed: dict[str, Path] = {}

    def keep(self, tensors: Mapping[str, QuantizedTensor], type: str) -> None:
        """Keep a matrix in a type, and the order of its columns, by checkpoint name."""
        place = self._folder / f"{len(self._kept)}.safetensors"
        save_tensors(place, dict(tensors))
        self._kept |= {(name, type): place for name in tensors}

    def feed(self, fed: Mapping[str, Tensor]) -> None:
        """Keep what matrices are fed, [tokens, in] by checkpoint name, to be rounded by."""
        place = self._folder / f"fed-{len(self._fed)}.safetensors"
        kept, first = dict[str, Tensor](), dict[str, str]()
        for name, given in fed.items():
            x = given.to(torch.bfloat16).cpu()
            # several matrices have one input
            first[name] = next((other for other, seen in kept.items() if torch.equal(seen, x)), name)
            kept.setdefault(first[name], x)
        save_file(kept, place, first)
        self._fed |= dict.fromkeys(fed, place)

    def of(self, choice: Choice, names: Iterable[str]) -> dict[str, QuantizedTensor]:
        """Return matrices in the types of a choice, with orders of their columns; those never fed are missing."""
        found: dict[str, QuantizedTensor] = {}
        for name in names:
            type = choice.get(name, "")
            if (name, type) not in self._kept and name in self._fed and not tensor_type(type).is_float:
                self.keep(self._painted(name, type), type)
            if (name, type) in self._kept:
                found |= load_tensors(self._kept[name, type])[0]
        return found

    def _painted(self, name: str, type: str) -> dict[str, QuantizedTensor]:
        weight = self._weight(name)
        grid = self._grids.of(name, weight, type)
        tensor, order = painted(weight, self._was_fed(name).to(weight.device), grid)
        found = {name: QuantizedTensor(tensor.type, {key: array.cpu() for key, array in tensor.arrays.items()})}
        return found | ({_order_of(name): column_order(order.cpu())} if grid.ordered else {})

    def _was_fed(self, name: str) -> Tensor:
        with safe_open(self._fed[name], "pt") as file:
            return file.get_tensor(file.metadata()[name]).float()


def painted(weight: Tensor, fed: Tensor, grid: Grid) -> tuple[QuantizedTensor, Tensor]:
    """Round a matrix by what it is fed.

    Args:
        weight: float32 [out, in].
        fed: float32 [tokens, in].
        grid: of the type.

    Returns:
        The matrix with its columns in the order that its type wants, and that order, int64 [in].
    """
    order, moment = order_for(weight, fed.square().mean(0), grid), fed.T @ fed / len(fed)
    return rounded(weight[:, order], moment[order][:, order], grid), order


def order_for(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """Return the order of columns that a matrix alone would get where its type wants one, int64 [in]."""
    if grid.places is None:
        return torch.arange(weight.shape[1], device=weight.device)
    scores = score([weight], InputStatistics(importance, importance), "error")
    return order_of(scores, likeness([weight]), None, *grid.places)


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
