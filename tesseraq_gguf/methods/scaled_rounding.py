"""Rounding to nearest after a learned division: what FlexRound and LRQ share.

    Ŵ = s1·(clamp(round(W / (s1·exp(S)) + z), 0, 2^b - 1) - z)

S, one number for every weight, is learned and thrown away: only codes, s1 and z are stored. s1 is learned with it, in
log space, of super-blocks their half float; z stays. Rounding and the storing of s1 are passed straight through. S
begins at 0, so learning begins at rounding to nearest, exactly; from another start than the papers' it begins at that
start's codes, for W is then what these are the nearest codes of. What S is made of is a `Divisor`: each method's own.

The gradient with respect to S is -W/exp(S) where the code is not clamped: large weights move most (FlexRound, §3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tesseraq_gguf.compute.fusion import fused
from tesseraq_gguf.methods.descent import Descent
from tesseraq_gguf.methods.held_out import better
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.start import NEAREST, Initialisation, Start
from tesseraq_gguf.types.grids import Grid
from tesseraq_gguf.types.quantized import QuantizedTensor

PAPER_STEPS = 5000
"""Steps that the papers' learning rates are for."""


class Divisor(Protocol):
    """S of one matrix.

    Attributes:
        variables: what is learned, leaves of the graph.
    """

    variables: list[Tensor]

    def log(self, dtype: torch.dtype) -> Tensor:
        """S, [out, in], differentiable in the variables; 0 at first. Matrices are multiplied in `dtype` for it."""
        ...


MakeDivisor = Callable[[Tensor, torch.Generator], Divisor]
"""Makes S for a matrix [out, in], on its device, with random numbers of the CPU."""


@dataclass(frozen=True)
class ScaledRounding:
    """The schedule.

    Attributes:
        divisor: makes S for a matrix.
        rates: learning rates for the paper's 5000 steps, by bits of a code; other types take the nearest.
        growth: exponent with which the rates grow by the ratio of 5000 to `steps`.
        steps: Adam steps of a block; the rate falls to 0 as a cosine.
        batch: samples of a step.
        initialisation: gives s1, z and W to begin at.
    """

    divisor: MakeDivisor
    rates: Mapping[int, float]
    growth: float = 0.5
    steps: int = PAPER_STEPS
    batch: int = 2
    initialisation: Initialisation = NEAREST

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Learn all matrices of the block together against the block's output."""
        starts = self.initialisation.start(problem)
        begun = {name: start.tensor for name, start in starts.items()}
        matrices = {
            name: ScaledMatrix(
                start, problem.grids[name], self.divisor(start.weight, problem.generator), problem.autocast
            )
            for name, start in starts.items()
        }
        adam = torch.optim.Adam(
            [{"params": m.variables, "lr": self.rate(problem.grids[name].bits)} for name, m in matrices.items()],
            fused=True,
        )
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        descent = Descent(problem, adam, "learning what weights are divided by", self.steps)
        for _ in range(self.steps):
            weights = {name: m.weight() for name, m in matrices.items()}
            descent.step(problem.loss(weights, problem.draw(self.batch)), weights)
            slower.step()
        descent.end(lambda: {name: m.weight() for name, m in matrices.items()})
        return better(problem, begun, {name: matrix.finish() for name, matrix in matrices.items()})

    def rate(self, bits: int) -> float:
        """Learning rate at first, for codes of so many bits."""
        nearest = min(self.rates, key=lambda known: abs(known - bits))
        return self.rates[nearest] * (PAPER_STEPS / self.steps) ** self.growth


class ScaledMatrix:
    """One matrix while it is learned.

    Attributes:
        variables: log s1 against the start, one number for each that the type stores for groups or super-blocks, and
            what S is made of.

    Args:
        start: where to begin.
        grid: the matrix's grid.
        divisor: S.
        dtype: that matrices are multiplied in.
    """

    def __init__(self, start: Start, grid: Grid, divisor: Divisor, dtype: torch.dtype = torch.float32) -> None:
        self._grid, self._divisor, self._dtype = grid, divisor, dtype
        self._weight = grid.grouped(start.weight)
        self._start = {key: array for key, array in start.tensor.arrays.items() if key != "q"}
        relaxed = grid.relax(self._start)
        tuning = relaxed["d" if "d" in relaxed else "scale"].requires_grad_()
        # z stays: where it is a minimum divided by a scale, the minimum moves along with the scale
        self._relaxed = {key: fixed if key == "zero" else tuning for key, fixed in relaxed.items()}
        self.variables = [tuning, *divisor.variables]

    def weight(self) -> Tensor:
        """Ŵ, [out, in], differentiable in the variables: what the type stores, in the dtype of products."""
        scale, zero = self._grid.realise(self._relaxed, self._start)
        log = self._grid.grouped(self._divisor.log(self._dtype))
        z = zero.detach()[..., None]
        rounded = _Rounded.apply(self._weight, log, scale[..., None], z, self._grid.highest, self._dtype)
        return rounded.flatten(-2)  # type: ignore[no-any-return]

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        """Return codes and parameters."""
        arrays = self._grid.tighten(self._relaxed, self._start)
        log = self._grid.grouped(self._divisor.log(self._dtype)).float()
        divided = (self._weight * torch.exp(-log)).flatten(-2)
        return self._grid.assemble(self._grid.encode(divided, arrays), arrays)


class _Rounded(torch.autograd.Function):
    """scale·(clamp(round(W/(scale·exp(log)) + zero)) - zero), with the rounding passed straight through."""

    @staticmethod
    def forward(  # noqa: PLR0913  (torch hands on what it is applied to)
        ctx: Any, weight: Tensor, log: Tensor, scale: Tensor, zero: Tensor, highest: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, log, scale, zero)
        ctx.highest = highest
        return _round(weight, log, scale, zero, highest, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        to_log, to_scale = _round_backward(gradient, *ctx.saved_tensors, ctx.highest)
        return None, to_log, to_scale, None, None, None


@fused
def _round(weight: Tensor, log: Tensor, scale: Tensor, zero: Tensor, highest: int, dtype: torch.dtype) -> Tensor:
    q = torch.round(weight * torch.exp(-log.float()) / scale + zero)
    return ((q.clamp(0, highest) - zero) * scale).to(dtype)


@fused
def _round_backward(
    gradient: Tensor, weight: Tensor, log: Tensor, scale: Tensor, zero: Tensor, highest: int
) -> tuple[Tensor, Tensor]:
    gradient = gradient.float()
    divided = weight * torch.exp(-log.float())
    q = torch.round(divided / scale + zero)
    inside = (q >= 0) & (q <= highest)
    # within the range, Ŵ is W/exp(S) but for the rounding: its part in s1 cancels
    to_log = torch.where(inside, -gradient * divided, 0.0)
    to_scale = (gradient * (q.clamp(0, highest) - zero)).sum(-1, keepdim=True) + to_log.sum(-1, keepdim=True) / scale
    return to_log.to(log.dtype), to_scale
