"""TesseraQ (arXiv 2410.19103): block reconstruction with progressive adaptive rounding and dequantisation-scale
tuning.

Soft quantiser (paper §3, with the fractional zero-point of our types):

    q = base + σr(ν)        base = floor(W/d + z) clamped to 0 … 2^b - 2,   σr(x) = clip(1.2·σ(x) - 0.1, 0, 1)
    Ŵ = 2σ(v)·d·(q - z)

On codebooks, rounding is between the two nearest codewords, lower and upper:

    Ŵ = 2σ(v)·d·(lower + σr(ν)·(upper - lower))

On lattices, a few neighbours have one ν. It moves them from the point that they start at to the nearest other one.

ν starts where Ŵ = W (as far as the range allows), v at 0. Lifecycle of a block:

1. Start: an initialisation gives d, z and the weights to round. From AWQ, as in the paper, these are the block's own
   with its channels scaled; from GPTQ they are those that its rounding errors have moved.
2. Stages k = 1 … K. Each opens by hardening: of all weights, the share `soft_shares[k]` whose σr(ν) is closest to 0.5
   stays soft, the rest is fixed at 0 or 1 for good; Adam's state is reset; then T steps follow on ν, v and z.
3. Before stage `settle_scales` d·2σ(v) moves to its 8-bit grid and stays; before stage `settle_zeros` z does. The
   rounding that is still soft then learns against the parameters that the kernel will see.
4. After the last stage everything is fixed. Codes and parameter codes leave as integers.

The paper's squared error is weighted by `BlockProblem.sensitivity`; ν learns at a higher rate where steps are few.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tesseraq_gguf.compute.fusion import fused
from tesseraq_gguf.methods.descent import Descent
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.held_out import better
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.start import Initialisation, Start
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.types.grids import Arrays, Grid
from tesseraq_gguf.types.quantized import QuantizedTensor

SOFT_SHARE = (
    0.8, 0.65, 0.5, 0.43, 0.38, 0.34, 0.3, 0.27, 0.24, 0.21,
    0.18, 0.15, 0.12, 0.10, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005,
)  # fmt: skip
"""Share of the weights still soft in each stage of progressive adaptive rounding, as in the paper."""

STRETCH, SHIFT = 1.2, 0.1
"""σr(x) = clip(STRETCH·σ(x) - SHIFT, 0, 1)."""

HARD = 20.0
"""|ν| of a fixed weight: σr is exactly 0 or 1 there, and its gradient exactly 0."""


@dataclass(frozen=True)
class TesseraQ:
    """The schedule.

    Attributes:
        steps: Adam steps of a stage (the paper's T = 250).
        batch: samples of a step.
        rounding_rate: learning rate of ν in types of 2 bits; those of more bits take the root of `parameter_share`.
        scale_rate: learning rate of v in types of 2 bits; those of more bits take `parameter_share` of it.
        zero_rate: learning rate of z, in units of one code, likewise.
        scale_decay: weight decay on v.
        settle_scales: stage (counted from 0) before which d moves to its grid.
        settle_zeros: stage before which z moves to its grid.
        soft_shares: share of the weights still soft in each stage.
        initialisation: gives the first scales, zero-points and weights.
    """

    steps: int = 250
    batch: int = 4
    rounding_rate: float = 1e-3
    scale_rate: float = 1e-3
    zero_rate: float = 1e-3
    scale_decay: float = 1e-4
    settle_scales: int = 14
    settle_zeros: int = 17
    soft_shares: tuple[float, ...] = SOFT_SHARE
    initialisation: Initialisation = field(default_factory=GPTQ)

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Learn all matrices of the block together against the block's output."""
        starts = self.initialisation.start(problem)
        begun = {name: start.tensor for name, start in starts.items()}
        soft = {name: SoftMatrix(start, problem.grids[name]) for name, start in starts.items()}
        del starts  # weights that rounding errors have moved: no longer needed
        for stage, share in enumerate(self.soft_shares):
            for matrix in soft.values():
                matrix.harden(share)
                if stage == self.settle_scales:
                    matrix.settle_scale()
                if stage == self.settle_zeros:
                    matrix.settle_zero()
            self._stage(problem, soft, stage)
        return better(problem, begun, {name: matrix.finish() for name, matrix in soft.items()})

    def _stage(self, problem: BlockProblem, soft: dict[str, SoftMatrix], stage: int) -> None:
        groups: list[dict[str, Any]] = []
        for share in sorted({m.parameter_share for m in soft.values()}):
            alike = [m for m in soft.values() if m.parameter_share == share]
            groups += [
                {"params": [m.rounding for m in alike], "lr": self.rounding_rate * share**0.5},
                {
                    "params": [m.tuning for m in alike if m.tuning.requires_grad],
                    "lr": self.scale_rate * share,
                    "weight_decay": self.scale_decay,
                },
                {"params": [m.zero for m in alike if m.zero.requires_grad], "lr": self.zero_rate * share},
            ]
        adam, stages = torch.optim.Adam([g for g in groups if g["params"]], fused=True), len(self.soft_shares)
        doing = f"stage {stage + 1} of {stages}, {100 * self.soft_shares[stage]:.0f} % soft"
        descent = Descent(problem, adam, doing, stages * self.steps, stage * self.steps)
        for _ in range(self.steps):
            weights = {name: m.weight(problem.autocast) for name, m in soft.items()}
            descent.step(problem.loss(weights, problem.draw(self.batch)), weights)
        descent.end(lambda: {name: m.weight(problem.autocast) for name, m in soft.items()})


class SoftMatrix:
    """One matrix while it is learned. Variables stand group by group: [groups of all rows, weights or 1].

    Attributes:
        rounding: ν, float32 [groups, weights of a group that can be rounded alone], learned.
        tuning: v, float32 [groups, or those of their scales that are stored, 1], learned until the scale settles.
        zero: z, float32 [groups, 1], learned until it settles; never if the grid fixes it.
        parameter_share: of the rates of v and z, and its root of ν's (the function of this name).

    Args:
        start: where to begin.
        grid: the matrix's grid.
    """

    def __init__(self, start: Start, grid: Grid) -> None:
        self._grid = grid
        self.parameter_share = parameter_share(grid)
        self._shape = start.weight.shape
        self._arrays: Arrays = grid.fixed(start.tensor.arrays)
        self._scale = grid.scale(start.tensor.arrays).view(-1, 1)
        self.zero = grid.zero(start.tensor.arrays).view(-1, 1).requires_grad_(grid.learns_zero)
        with torch.no_grad():
            position = start.weight.reshape(-1, grid.group) / self._scale + self.zero
            self._code, lower, gap = grid.neighbours(start.weight, start.tensor.arrays)
            self._base = lower.view_as(position)
            self._gap = None if gap is None else gap.view_as(position)
            fraction = _share(position - self._base, self._gap, grid.vector).clamp_(1e-4, 1 - 1e-4)
        self.rounding = inverse_soft_step(fraction).requires_grad_()
        self.tuning = torch.zeros_like(grid.gather(self._of_rows(self._scale)).view(-1, 1)).requires_grad_()

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ, [out, in], differentiable in ν, v and z; in the dtype that it will be multiplied in."""
        scale = self._tuned()
        soft = _SoftWeight.apply
        weight = soft(self.rounding, self._base, self._gap, scale, self.zero, self._grid.vector, dtype)
        return weight.view(self._shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def harden(self, share: float) -> None:
        """Keep the `share` of weights whose σr(ν) is closest to 0.5 soft; fix the rest at 0 or 1."""
        # σr is monotone and odd around 0, so |σr(ν) - 0.5| orders weights as |ν| does
        distance = self.rounding.abs().flatten()
        keep = round(share * distance.numel())
        limit = ranked(distance, keep, sorting=distance.is_cuda) if keep else distance.new_tensor(-1.0)
        self.rounding.copy_(
            torch.where(
                self.rounding.abs() <= limit,
                self.rounding,
                torch.copysign(self.rounding.new_tensor(HARD), self.rounding),
            )
        )

    @torch.no_grad()
    def settle_scale(self) -> None:
        """Move the scale, d·2σ(v), to where the type can store it; v stops learning."""
        self._arrays |= self._grid.settle_scale(self._of_rows(self._tuned()))
        self._scale = self._grid.scale(self._arrays).view(-1, 1)
        self.tuning = torch.zeros_like(self.tuning)

    @torch.no_grad()
    def settle_zero(self) -> None:
        """Move z to where the type can store it beside the settled scale; it stops learning."""
        self._arrays |= self._grid.settle_zero(self._of_rows(self.zero.detach()), self._of_rows(self._scale))
        self.zero = self._grid.zero(self._arrays).view(-1, 1)

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        """Fix what is still soft and return codes and parameters."""
        up = _spread(self.rounding > 0, self._grid.vector).view(self._shape)
        gap = None if self._gap is None else self._gap.view(self._shape)
        return self._grid.assemble(self._grid.pick(self._code, gap, up), self._arrays)

    def _tuned(self) -> Tensor:
        return self._scale * 2 * torch.sigmoid(self._grid.spread(self._of_rows(self.tuning)).view_as(self._scale))

    def _of_rows(self, parameter: Tensor) -> Tensor:
        return parameter.view(self._shape[0], -1)


def _share(offset: Tensor, gap: Tensor | None, vector: int) -> Tensor:
    """How far weights are on the way from their lower level to the other one, of a vector nearest to where they are.

    Args:
        offset: from the lower level, float32 [groups, weights].
        gap: of the other level, or None where it is 1.
        vector: weights that go together.
    """
    if gap is None:
        return offset
    if vector == 1:
        return offset / gap.clamp_min(1)  # equal codewords leave no choice
    gap = gap.float()
    return _gathered(offset * gap, vector) / _gathered(gap.square(), vector).clamp_min(1)


def _spread(of_vectors: Tensor, vector: int) -> Tensor:
    """Give the weights of vectors what these have: [groups, vectors] to [groups, weights]."""
    return of_vectors if vector == 1 else of_vectors[..., None].expand(-1, -1, vector).flatten(1)


def _gathered(of_weights: Tensor, vector: int) -> Tensor:
    """Add up what the weights of vectors have: [groups, weights] to [groups, vectors]."""
    return of_weights if vector == 1 else of_weights.unflatten(1, (-1, vector)).sum(2)


def parameter_share(grid: Grid) -> float:
    """The share of the rates of scales and zero-points that suits a grid, 0 to 1: 1 for codes of up to 2 bits.

    When a scale moves, all weights of its group move with it, those with the outermost codes by as many times more as
    there are codes. With four bits a rate that suits two has them move by whole codes before their rounding can follow.
    The start is also closer to what is best, so rounding itself needs no such haste: more of it would fit the
    calibration text alone. (docs/notes/steps-and-rates.md has the losses.)
    """
    part, _ = max(grid.parts, key=lambda part: len(part[1]))  # where kinds of weights differ, what most are
    return min(1.0, 3 / part.highest)


def ranked(values: Tensor, rank: int, sorting: bool) -> Tensor:
    """The `rank`-th smallest of values [n], counted from 1, as a tensor without dimensions.

    Selecting is the least work, but torch selects with a single thread block on a GPU, and sorts with all of them.
    """
    return values.sort().values[rank - 1] if sorting else values.kthvalue(rank).values


def soft_step(x: Tensor) -> Tensor:
    """σr(x) = clip(1.2·σ(x) - 0.1, 0, 1), any shape."""
    return (torch.sigmoid(x) * STRETCH - SHIFT).clamp(0, 1)


def inverse_soft_step(y: Tensor) -> Tensor:
    """The x with σr(x) = y, for y in (0, 1)."""
    return torch.logit((y + SHIFT) / STRETCH)


class _SoftWeight(torch.autograd.Function):
    """scale·(base + gap·σr(ν) - z). Backward computes σr again: to keep it would cost more than it does.

    A gap of None is 1. ν is that of `vector` weights.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  (torch hands on what it is applied to)
        ctx: Any,
        rounding: Tensor,
        base: Tensor,
        gap: Tensor | None,
        scale: Tensor,
        zero: Tensor,
        vector: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(rounding, base, gap, scale, zero)
        ctx.vector = vector
        return _soft_weight(rounding, base, gap, scale, zero, vector, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor, None, None]:
        to_rounding, to_scale, to_zero = _soft_weight_backward(gradient, *ctx.saved_tensors, ctx.vector)
        return to_rounding, None, None, to_scale, to_zero, None, None


@fused
def _soft_weight(  # noqa: PLR0913
    rounding: Tensor, base: Tensor, gap: Tensor | None, scale: Tensor, zero: Tensor, vector: int, dtype: torch.dtype
) -> Tensor:
    step = _spread(soft_step(rounding), vector)
    return (((step if gap is None else step * gap) + base - zero) * scale).to(dtype)


@fused
def _soft_weight_backward(  # noqa: PLR0913
    gradient: Tensor, rounding: Tensor, base: Tensor, gap: Tensor | None, scale: Tensor, zero: Tensor, vector: int
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = gradient.float()
    sigmoid = torch.sigmoid(rounding)
    stretched = sigmoid * STRETCH - SHIFT
    inside = (stretched > 0) & (stretched < 1)
    step, slope = stretched.clamp(0, 1), torch.where(inside, sigmoid * (1 - sigmoid) * STRETCH, 0.0)
    step, slope = _spread(step, vector), _spread(slope, vector)
    if gap is not None:
        step, slope = step * gap, slope * gap
    to_offset = gradient * scale
    to_scale = (gradient * (step + base - zero)).sum(1, keepdim=True)
    return _gathered(to_offset * slope, vector), to_scale, -to_offset.sum(1, keepdim=True)


def build(settings: Settings, start: Initialisation) -> TesseraQ:
    """Return the method for its row of the table."""
    return TesseraQ(
        steps=settings.steps,
        batch=settings.batch,
        rounding_rate=settings.rounding_rate,
        scale_rate=settings.parameter_rate,
        zero_rate=settings.parameter_rate,
        initialisation=start,
    )
