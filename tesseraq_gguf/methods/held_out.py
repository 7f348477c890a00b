"""What learning is judged by: sequences that nothing is learned on, and some of those that it learned on.

On little text, or with high rates, learning fits what it sees and ends worse than it began on everything else. With a
few steps that are too large it ends worse on what it sees, too. So both what a method begins at and what it learned are
run on sequences of either kind, as the file will run them, and the end is kept where it is worse on neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesseraq_gguf.types.quantized import QuantizedTensor

if TYPE_CHECKING:
    from tesseraq_gguf.methods.problem import BlockProblem


_LEARNED_ON = 32
"""Sequences that were learned on and judge nevertheless, at most: those that the loss which is told is a mean of."""

_AT_ONCE = 8
"""Of these, how many are run together."""


@dataclass(frozen=True)
class HeldOut:
    """Sequences of one block.

    Attributes:
        inputs: on the quantised chain, float32 [sequences, length, hidden]: this process' share.
        targets: what the full-precision chain makes of its own, of the same shape.
        sequences: of all processes together.
    """

    inputs: Tensor
    targets: Tensor
    sequences: int


@dataclass(frozen=True)
class Verdict:
    """How learning a block ended.

    Attributes:
        start: weighted squared error on the sequences held out with what learning began at.
        end: the same with what it came to.
        kept_start: whether the start is kept, because the end is worse, on these or on what it was learned on.
    """

    start: float
    end: float
    kept_start: bool

    @property
    def kept(self) -> float:
        """The error of what is kept."""
        return self.start if self.kept_start else self.end


def better(
    problem: BlockProblem,
    start: dict[str, QuantizedTensor],
    end: dict[str, QuantizedTensor],
    vectors: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizedTensor]:
    """Return what learning came to where it errs no more than what it began at; else that.

    It must err no more on the sequences held out, if any are, nor on those that were learned on. `problem.verdict` says
    how it went on those held out; the last method that learned counts.

    Args:
        problem: the block.
        start: matrices by module name, as they would leave if nothing was learned.
        end: learned matrices by module name.
        vectors: parameters of the block that were learned along with them, by name within the block. It gets them if
            the end is kept.
    """
    problem.report(0, 0, "judging what was learned")
    vectors = vectors or {}
    kept_start = _is_worse(problem, _losses(problem, _learned_on(problem), start, end, vectors, _AT_ONCE))
    if problem.held_out is not None:
        losses = _losses(problem, problem.held_out, start, end, vectors, 1)
        kept_start |= _is_worse(problem, losses)
        problem.verdict = Verdict(*losses, kept_start)
    if kept_start:
        return start
    for name, value in vectors.items():
        problem.block.replace(name, value)
    return end


def _learned_on(problem: BlockProblem) -> HeldOut:
    sequences = min(problem.samples or len(problem.inputs), _LEARNED_ON)
    here = problem.team.count(sequences)
    return HeldOut(problem.inputs[:here], problem.targets[:here], sequences)


def _is_worse(problem: BlockProblem, losses: tuple[float, float]) -> bool:
    """Whether the end is worse than the start: what the first process finds, whose codes leave."""
    return problem.team.from_first(lambda: not losses[1] <= losses[0])


def _losses(
    problem: BlockProblem,
    sequences: HeldOut,
    start: Mapping[str, QuantizedTensor],
    end: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Tensor],
    at_once: int,
) -> tuple[float, float]:
    """Mean losses of start and end on sequences, in float32 as the chain is run on."""
    return _loss(problem, sequences, start, {}, at_once), _loss(problem, sequences, end, vectors, at_once)


@torch.no_grad()
def _loss(
    problem: BlockProblem,
    sequences: HeldOut,
    tensors: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Tensor],
    at_once: int,
) -> float:
    weights = {name: problem.grids[name].dequantize(t).to(problem.device) for name, t in tensors.items()}
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(sequences.inputs), at_once):
        hidden, target = (x[first : first + at_once] for x in (sequences.inputs, sequences.targets))
        out, target = problem.quantised(hidden.to(problem.device), weights, vectors), target.to(problem.device)
        loss = problem.weighted((out.float() - target).square(), target)
        total += len(hidden) * float(loss)
    problem.team.add_up([total])
    return float(total) / sequences.sequences
