"""Steps of Adam on a block, the same in all processes, which end when they leave the finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.models.finite import finite, origin

_EVERY = 16
"""Steps after which the losses of a GPU are looked at: looking waits for it."""


class Descent:
    """One run of Adam.

    Args:
        problem: the block.
        adam: with all variables.
    """

    def __init__(self, problem: BlockProblem, adam: torch.optim.Optimizer) -> None:
        self._problem, self._adam = problem, adam
        self._variables = [v for group in adam.param_groups for v in group["params"]]
        self._steps = 0
        self._losses = torch.zeros((), device=problem.device)

    def step(self, loss: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take a step.

        Args:
            loss: differentiable in the variables.
            weights: matrices of the block that the loss is of, by module name.

        Raises:
            NotFiniteError: the loss is not finite.
        """
        self._adam.zero_grad()
        loss.backward()
        self._problem.average_gradients(self._variables)
        self._adam.step()
        self._steps += 1
        self._losses += loss.detach()
        if self._losses.device.type == "cpu" or self._steps % _EVERY == 0:
            self._look(weights)

    def end(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Look at what the last step left.

        Args:
            weights: gives the matrices of the block by module name, as they are now.

        Raises:
            NotFiniteError: a variable is not finite.
        """
        if not all(map(finite, [self._losses, *self._variables])):
            self._stop(weights())

    def _look(self, weights: Mapping[str, Tensor]) -> None:
        if not finite(self._losses):
            self._stop(weights)

    @torch.no_grad()
    def _stop(self, weights: Mapping[str, Tensor]) -> None:
        problem = self._problem
        where = next((f"in {problem.full_name(n)}" for n, w in weights.items() if not finite(w)), None)
        if where is None:
            hidden = problem.inputs[:1].to(problem.device)
            with problem.precision():
                where = origin(problem.block, lambda: problem.quantised(hidden, weights))
        raise NotFiniteError(
            f"block {problem.block.index + 1}: learning left the finite numbers after {self._steps} steps, {where}. "
            "Learn with --device cpu, in a type of more bits, or with --method gptq"
        )
