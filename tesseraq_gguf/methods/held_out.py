"""What learning is judged by: sequences that nothing is learned on.

On little text, or with high rates, learning fits what it sees and ends worse than it began on everything else. So both
what a method begins at and what it learned are run on sequences held out, as the file will run them, and the better
one is kept.
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
        kept_start: whether the start is kept, because the end is worse.
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
    """Return what learning began at or what it came to, whichever errs less on the sequences held out.

    Where none are held out that is the end. `problem.verdict` says how it went; the last method that learned counts.

    Args:
        problem: the block.
        start: matrices by module name, as they would leave if nothing was learned.
        end: learned matrices by module name.
        vectors: parameters of the block that were learned along with them, by name within the block. It gets them if
            the end is kept.
    """
    vectors = vectors or {}
    if problem.held_out is not None:
        before, after = _loss(problem, start, {}), _loss(problem, end, vectors)
        kept_start = problem.team.from_first(lambda: not after <= before)
        problem.verdict = Verdict(before, after, kept_start)
        if kept_start:
            return start
    for name, value in vectors.items():
        problem.block.replace(name, value)
    return end


@torch.no_grad()
def _loss(problem: BlockProblem, tensors: Mapping[str, QuantizedTensor], vectors: Mapping[str, Tensor]) -> float:
    """Mean loss on the sequences held out, in float32 as the chain is run on."""
    assert problem.held_out is not None
    weights = {name: problem.grids[name].dequantize(t).to(problem.device) for name, t in tensors.items()}
    total = torch.zeros((), dtype=torch.float64)
    for hidden, target in zip(problem.held_out.inputs, problem.held_out.targets, strict=True):
        out = problem.quantised(hidden[None].to(problem.device), weights, vectors)
        total += float(problem.weighted((out.float() - target[None].to(problem.device)).square()))
    problem.team.add_up([total])
    return float(total) / problem.held_out.sequences
