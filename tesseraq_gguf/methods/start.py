"""Starts: the parameters and weights that learning begins at. Each is a method of its own too.

`--init` chooses among them: `none` is `Nearest`, the others have a file of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.table import Settings
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


def build(_: Settings) -> Nearest:
    """Return the start for its row of the table."""
    return NEAREST
