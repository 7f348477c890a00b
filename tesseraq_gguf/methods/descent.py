"""Steps of Adam on a block, the same in all processes, which end when they leave the finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.methods.problem import BlockProblem, Mark
from tesseraq_gguf.models.finite import finite, origin

_EVERY = 16
"""Steps after which the losses of a GPU are looked at: looking waits for it."""

_MARKS = 20
"""Points of a block's curve of losses."""


class Descent:
    """One run of Adam.

    Args:
        problem: the block.
        adam: with all variables.
        doing: what it is told to do.
        total: steps that the curve of losses is of.
        done: steps of these that were taken before.
    """

    def __init__(
        self, problem: BlockProblem, adam: torch.optim.Optimizer, doing: str, total: int, done: int = 0
    ) -> None:
        self._problem, self._adam = problem, adam
        self._doing, self._total, self._done = doing, total, done
        self._variables = [v for group in adam.param_groups for v in group["params"]]
        self._steps = 0
        self._losses = torch.zeros((), device=problem.device)
        self._marked = 0, 0.0

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
        if self._steps - self._marked[0] >= self._total / _MARKS:
            self._mark()
        self._problem.report(self._done + self._steps, self._total, self._doing)

    def end(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Look at what the last step left.

        Args:
            weights: gives the matrices of the block by module name, as they are now.

        Raises:
            NotFiniteError: a variable is not finite.
        """
        if not all(map(finite, [self._losses, *self._variables])):
            self._stop(weights())
        self._mark()

    def _mark(self) -> None:
        losses, (steps, before) = float(self._losses), self._marked
        if self._steps > steps:
            mean = (losses - before) / (self._steps - steps)
            self._problem.curve.append(Mark(self._doing, self._done + self._steps, mean))
            self._marked = self._steps, losses

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
