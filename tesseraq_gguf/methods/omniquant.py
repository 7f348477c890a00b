"""OmniQuant's learnable weight clipping (Shao et al., arXiv 2308.13137, §3.2) as a start.

The ends of every group's range are learned against the block's output, weights round to nearest within:

    lo' = 2σ(β)·lo,  hi' = 2σ(γ)·hi         β = γ = 0 at first
    d = (hi' - lo') / (2^b - 1),  z = -lo' / d
    Ŵ = d·(clamp(round(W/d + z), 0, 2^b - 1) - z)

The paper takes lo and hi from the group's minimum and maximum, shrinks them by a factor that starts near 1, and learns
through the rounding with a straight-through estimator. Here they are the ends of the range that the type's own search
found, which learning widens as well as narrows, and the gradient is that of the codes as they are, chosen anew in each
step: from a range that is searched already, the straight-through estimator shrinks on and makes the loss grow. Storing
d and z in the type is passed straight through. A type that fixes z has one factor per group, on d; d keeps its sign.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tesseraq_gguf.methods.awq import ClipSearch
from tesseraq_gguf.methods.descent import Descent
from tesseraq_gguf.methods.held_out import better
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.start import Initialisation, Start
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.types.grid import through
from tesseraq_gguf.types.grids import Arrays, Grid
from tesseraq_gguf.types.quantized import QuantizedTensor
from tesseraq_gguf.types.search import SMALLEST

_CLIPPING = 5
"""Steps in which the clipping is learned, for each step of a stage of TesseraQ."""


@dataclass(frozen=True)
class OmniQuant:
    """Learnable weight clipping.

    Attributes:
        steps: Adam steps of a block.
        batch: samples of a step.
        rate: learning rate of β and γ at 2 bits (the paper's 5e-3), less at more bits; it falls to 0 linearly.
        ranges: gives the ranges to begin at.
    """

    steps: int = 200
    batch: int = 4
    rate: float = 5e-3
    ranges: Initialisation = field(default_factory=ClipSearch)

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Return a start for every matrix of the problem, by module name."""
        begun = {name: start.tensor for name, start in self.ranges.start(problem).items()}
        clipped = {name: ClippedMatrix(w, begun[name], problem.grids[name]) for name, w in problem.matrices().items()}
        # what a range's end moves by is counted in codes: with more of them, the same rate would move it further
        groups = [
            {"params": list(m.factors.values()), "lr": self.rate * 3 / problem.grids[name].highest}
            for name, m in clipped.items()
        ]
        adam = torch.optim.Adam(groups, fused=True)
        slower = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / self.steps)
        descent = Descent(problem, adam, "learning ranges", self.steps)
        for _ in range(self.steps):
            weights = {name: m.weight() for name, m in clipped.items()}
            descent.step(problem.loss(weights, problem.draw(self.batch)), weights)
            slower.step()
        descent.end(lambda: {name: m.weight() for name, m in clipped.items()})
        kept = better(problem, begun, {name: matrix.finish() for name, matrix in clipped.items()})
        return {name: Start(tensor, clipped[name].original) for name, tensor in kept.items()}


class ClippedMatrix:
    """One matrix while its ranges are learned.

    Attributes:
        original: the matrix, float32 [out, in].
        factors: γ under `high`, and β under `low` if the grid's zero-points are free; float32 [rows, groups], learned.

    Args:
        weight: the matrix.
        tensor: parameters to begin at.
        grid: the matrix's grid.
    """

    def __init__(self, weight: Tensor, tensor: QuantizedTensor, grid: Grid) -> None:
        self.original = weight
        self._grid = grid
        self._scale = grid.scale(tensor.arrays)
        self._zero = grid.zero(tensor.arrays)
        ends = ("high", "low") if grid.learns_zero else ("high",)
        self.factors = {end: torch.zeros_like(self._scale).requires_grad_() for end in ends}

    def weight(self) -> Tensor:
        """Ŵ, float32 [out, in], differentiable in β and γ; its values are what the type stores."""
        scale, zero, _ = self._parameters()
        scale, zero = scale[..., None], zero[..., None]
        q = (self._grid.grouped(self.original) / scale.detach() + zero.detach()).round_().clamp_(0, self._grid.highest)
        return (scale * (q - zero)).flatten(-2)

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        """Return the nearest codes within the learned ranges, and the parameters."""
        *_, arrays = self._parameters()
        return self._grid.assemble(self._grid.encode(self.original, arrays), arrays)

    def _parameters(self) -> tuple[Tensor, Tensor, Arrays]:
        """Scales and zero-points as the type stores them, differentiable, and what it stores."""
        grid = self._grid
        high = 2 * torch.sigmoid(self.factors["high"])
        if not grid.learns_zero:
            wanted = self._scale * high
            arrays = grid.settle_scale(wanted.detach())
            return through(wanted, grid.scale(arrays)), self._zero, arrays
        low_end = -self._zero * self._scale * 2 * torch.sigmoid(self.factors["low"])
        high_end = (grid.highest - self._zero) * self._scale * high
        wanted = ((high_end - low_end) / grid.highest).clamp_min(SMALLEST)
        arrays = grid.settle_scale(wanted.detach())
        scale = through(wanted, grid.scale(arrays))
        zero = -low_end / wanted
        arrays = arrays | grid.settle_zero(zero.detach(), scale.detach())
        return scale, through(zero, grid.zero(arrays)), arrays


def build(settings: Settings) -> OmniQuant:
    """Return the start for its row of the table."""
    return OmniQuant(steps=_CLIPPING * settings.steps, batch=settings.batch)
