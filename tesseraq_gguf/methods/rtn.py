"""Round to nearest: every group gets the parameters with the least squared error of its weights; no data, no learning."""

from __future__ import annotations

from tesseraq_gguf.quantized import QuantizedTensor
from tesseraq_gguf.reconstruction import BlockProblem


class RoundToNearest:
    """The baseline every other method must beat."""

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Round each matrix by itself."""
        return {name: problem.grids[name].quantize(w) for name, w in problem.matrices().items()}
