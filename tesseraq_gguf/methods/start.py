"""Starts: the parameters and weights that learning begins at. Each is a method of its own too.

`--init` chooses among them: `none` is `Nearest`, `file` is `AsGiven`, the others have a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.types.grids import Grid
from tesseraq_gguf.types.quantized import QuantizedTensor


@dataclass(frozen=True)
class Start:
    """Where learning one matrix begins.

    Attributes:
        tensor: codes and parameters.
        weight: what the rounding variables begin at, float32 [out, in]: the matrix, or the matrix as rounding errors
            elsewhere have moved it.
    """

    tensor: QuantizedTensor
    weight: Tensor


class Initialisation(Protocol):
    """A way to find starts."""

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Return a start for every matrix of the problem, by module name."""
        ...


@dataclass(frozen=True)
class Nearest:
    """Round to nearest: parameters of least squared error of the weights, nothing moved."""

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Return a start for every matrix of the problem, by module name."""
        return {
            name: Start(problem.grids[name].quantize(w, problem.importance.get(name)), w)
            for name, w in problem.matrices().items()
        }


NEAREST = Nearest()

_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the way from what a code stands for to a weight, ascending."""


@dataclass(frozen=True)
class AsItStarts:
    """The method that learns nothing more: the start's codes are the result.

    Attributes:
        initialisation: finds the starts.
    """

    initialisation: Initialisation

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Return the learned matrices by module name."""
        return {name: start.tensor for name, start in self.initialisation.start(problem).items()}


@dataclass(frozen=True)
class AsGiven:
    """Begin at codes and parameters that are there already.

    Attributes:
        given: gives them, by checkpoint name.
    """

    given: Callable[[str], QuantizedTensor]

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Return a start for every matrix of the problem, by module name."""
        starts = {}
        for name, w in problem.matrices().items():
            tensor = self.given(problem.full_name(name))
            tensor = QuantizedTensor(tensor.type, {key: a.to(w.device) for key, a in tensor.arrays.items()})
            problem.grids[name] = problem.grids[name].of(tensor.arrays)
            starts[name] = Start(tensor, within_codes(w, tensor, problem.grids[name]))
        return starts


@torch.no_grad()
def within_codes(weight: Tensor, tensor: QuantizedTensor, grid: Grid) -> Tensor:
    """Weights as near to `weight` as they can be while `tensor` has their nearest codes, float32 [out, in].

    Those whose code is another than the nearest are moved towards the value that their code stands for.
    """
    value, arrays = grid.dequantize(tensor), {key: a for key, a in tensor.arrays.items() if key != "q"}
    moved = value.clone()
    for share in _SHARES:
        nearer = torch.lerp(value, weight, share)
        rounded = grid.dequantize(grid.assemble(grid.encode(nearer, arrays), arrays))
        same = (rounded == value).unflatten(-1, (-1, grid.coupled)).all(-1)
        moved = torch.where(same.repeat_interleave(grid.coupled, -1), nearer, moved)
    return moved


def build_given(settings: Settings) -> AsGiven:
    """Return the start at a file for its row of the table."""
    assert settings.given, "whoever begins at a file opens it"
    return AsGiven(settings.given)


def build(_: Settings) -> Nearest:
    """Return the start for its row of the table."""
    return NEAREST
