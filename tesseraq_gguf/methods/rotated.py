"""Rotated start (QuaRot, arXiv 2404.00456; TesseraQ's for W4A4 and W3A3): channels are mixed, then learned.

Every head's values are multiplied by a random Hadamard matrix, and the columns of the attention's output by its
transpose: the block stays the same function, but no channel of what that matrix is fed stands out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tesseraq_gguf.methods.problem import BlockProblem, Method
from tesseraq_gguf.models.rotation import hadamard, rotations
from tesseraq_gguf.types.quantized import QuantizedTensor


@dataclass(frozen=True)
class Rotated:
    """Mix channels, then learn by another method.

    Attributes:
        then: learns the rotated block.
    """

    then: Method

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Rotate what can be rotated in the block, then learn it."""
        self.rotate(problem)
        return self.then.learn(problem)

    def rotate(self, problem: BlockProblem) -> list[str]:
        """Fold rotations into the block.

        Returns:
            Names of the linears whose rows were mixed.
        """
        sample = problem.inputs[:1].to(problem.device)
        found = rotations(problem.block, problem.arguments, sample, problem.grids.keys())
        for place, rotation in enumerate(found):
            rotation.apply(problem.block, hadamard(rotation.run, place).to(problem.device))
        return [rotation.producer for rotation in found]
