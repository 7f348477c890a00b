"""PTQ1.61 (arXiv 2502.13179): the channels that matter most at 4 bits, all else binary, its scales learned.

    Ŵ = (r1 ⊗ r2) ∘ (α·sign(W))       α = mean|W|, r1 and r2 = 1 at first

Signs stay those of W, salient weights are rounded to nearest and stay. Learned are α, r1 and r2, each block of the
model by itself, from

    L = Σ over both targets Y of  MSE(F(X_q, Ŵ), Y) - log cos(F(X_q, Ŵ), Y),    Y = F(X_fp, W) and F(X_q, W)

with AdamW without decay. On the grid of PTQ1_61 this becomes:

- α·r1 is d of every 128 weights of a row; the paper has one for the row.
- r2, one number for each input channel, is shared by the matrices that read the input: it is multiplied into the
  weights of the norm that makes it, so it costs nothing. Where an earlier matrix makes the input (values for the
  attention's output, up for down), r2 is a factor of that matrix's rows, which d of these rows already is.
- The paper's code binarises around a mean μ of the row, α·sign(W - μ) + μ. The type has no place for it, and
  there is little to gain: of the squared error of the demo model's binary weights it would take 0.7 %
  (`scripts/run bench salient --mean`).
- Mean squared error and cosine are of different size, by what the residual stream is; here the error is relative to
  the target's energy. Both are in the metric of the engine's sensitivity: on a block of the demo model, where rounding
  alone left a loss of 124 and the block's own weights 47, 60 steps came to 99 with it and to 114 without.
- Scales are learned in log space. The paper's rate of 5e-4 for α, which is a few hundredths, is one of some hundredths
  there: with rates of 0.005 for d and 0.002 for r2 the same steps came to 95.

The mask, by the peaks of activations, is in the order of the columns already (`column_order.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.compute.affine import Affine
from tesseraq_gguf.methods.descent import Descent
from tesseraq_gguf.methods.held_out import better
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.start import Nearest
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.models.folding import Fold
from tesseraq_gguf.types.grids import Grid
from tesseraq_gguf.types.quantized import QuantizedTensor

_LEAST_COSINE = 1e-6
"""Below it, a cosine's logarithm has no gradient: tokens that point elsewhere entirely must not break the others."""

_LEAST_ENERGY = 1e-30
"""Of a token, or of all: a target of zeros is divided by it."""

PAPER_STEPS = 2560
"""Steps that the paper's rates are for: 20 epochs of 128 sequences."""


@dataclass(frozen=True)
class Ptq161:
    """The schedule.

    Attributes:
        steps: Adam steps of a block; the rates fall to 0 as a cosine.
        batch: samples of a step.
        parts: how much of the method is done, one of `table.PARTS`.
        scale_rate: learning rate of log d, for the paper's steps.
        column_rate: learning rate of log r2, for the paper's steps.
        growth: exponent with which the rates grow by the ratio of the paper's steps to `steps`.
        weighted: whether errors are weighted by the sensitivity of the answers; the paper's are not.
        relative: whether the squared error is divided by that of the target; the paper's is not.
        both: whether the block's answer on the quantised chain is a target too.
    """

    steps: int = PAPER_STEPS
    batch: int = 1
    parts: str = "cosine"
    scale_rate: float = 5e-3
    column_rate: float = 2e-3
    growth: float = 0.5
    weighted: bool = True
    relative: bool = True
    both: bool = True

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Learn the scales of all matrices of the block together against the block's output."""
        start = {name: s.tensor for name, s in Nearest().start(problem).items()}
        if self.parts == "mask":
            return start
        matrices = {name: _Binary(tensor, problem.grids[name]) for name, tensor in start.items()}
        columns = [
            (fold, torch.zeros(fold.channels, device=problem.device).requires_grad_()) for fold in _norms(problem)
        ]
        scales = [m.relaxed["d"] for m in matrices.values() if m.learned]
        growth = (PAPER_STEPS / self.steps) ** self.growth
        groups = [
            {"params": scales, "lr": self.scale_rate * growth},
            {"params": [log for _, log in columns], "lr": self.column_rate * growth},
        ]
        adam = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0, fused=True)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        descent = Descent(problem, adam, "learning scales", self.steps)
        for _ in range(self.steps):
            weights = {name: m.weight() for name, m in matrices.items()}
            loss = self.loss(problem, weights, _vectors(problem, columns), problem.draw(self.batch))
            descent.step(loss, weights)
            slower.step()
        descent.end(lambda: {name: m.weight() for name, m in matrices.items()})
        learned = {name: matrix.finish() for name, matrix in matrices.items()}
        with torch.no_grad():
            return better(problem, start, learned, _vectors(problem, columns))

    def loss(
        self, problem: BlockProblem, weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor], samples: Tensor
    ) -> Tensor:
        """The method's loss on samples, with matrices by module name and vectors by name within the block."""
        hidden = problem.inputs[samples].to(problem.device)
        targets = [problem.targets[samples].to(problem.device)]
        with problem.precision():
            if self.both:
                with torch.no_grad():
                    targets.append(problem.forward(hidden).float())
            out = problem.quantised(hidden, weights, vectors).float()
        metric = problem.sensitivity if self.weighted else torch.ones_like(problem.sensitivity)
        return sum((self._distance(out, target, metric) for target in targets), out.new_zeros(()))

    def _distance(self, out: Tensor, target: Tensor, metric: Tensor) -> Tensor:
        error = energy(out - target, out - target, metric).mean()
        if self.relative:
            error = error / energy(target, target, metric).mean().clamp_min(_LEAST_ENERGY)
        return error + minus_log_cosine(out, target, metric).mean() if self.parts == "cosine" else error


def energy(a: Tensor, b: Tensor, metric: Tensor) -> Tensor:
    """Inner products of tokens, [batch, length].

    Args:
        a, b: float32 [batch, length, hidden].
        metric: weights of the channels, float32 [2, hidden]: in the first position, and in all others.
    """
    product = a * b
    return torch.cat([product[:, :1] @ metric[0], product[:, 1:] @ metric[1]], 1)


def minus_log_cosine(a: Tensor, b: Tensor, metric: Tensor) -> Tensor:
    """-log of the cosine between tokens, [batch, length]; arguments as of `energy`."""
    # clamped before the root: that of 0 has no gradient, and tokens without a direction must not break the others
    lengths = [energy(x, x, metric).clamp_min(_LEAST_ENERGY).sqrt() for x in (a, b)]
    cosine = energy(a, b, metric) / (lengths[0] * lengths[1])
    return -cosine.clamp_min(_LEAST_COSINE).log()


class _Binary:
    """One matrix while the scales of its binary weights are learned.

    Attributes:
        relaxed: variables of the grid, 0 at first; only that of d is learned.
        learned: whether there is a d; matrices in other types stay as they were rounded.
    """

    def __init__(self, start: QuantizedTensor, grid: Grid) -> None:
        self._grid, self._start = grid, start
        self._arrays = {key: array for key, array in start.arrays.items() if key != "q"}
        self.learned = grid.ordered
        self.relaxed = grid.relax(self._arrays)
        if self.learned:
            self.relaxed["d"].requires_grad_()

    def weight(self) -> Tensor:
        """Ŵ, float32 [out, in], as the type would store it, differentiable in the variable."""
        if not self.learned:
            return self._grid.dequantize(self._start)
        scale, zero = self._grid.realise(self.relaxed, self._arrays)
        return Affine.apply(self._grid.levels(self._start), scale, zero).flatten(-2)  # type: ignore[no-any-return]

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        """Return codes and parameters."""
        if not self.learned:
            return self._start
        return self._grid.assemble(self._start.arrays["q"], self._grid.tighten(self.relaxed, self._arrays))


def _norms(problem: BlockProblem) -> list[Fold]:
    """Norms whose output is what matrices of the problem read, and nothing else."""
    matrices = problem.block.matrices()
    return [fold for fold in problem.folds() if fold.producer not in matrices]


def _vectors(problem: BlockProblem, columns: list[tuple[Fold, Tensor]]) -> dict[str, Tensor]:
    """Parameters of norms multiplied by r2 = exp(variable), by name within the block."""
    return {name: v for fold, log in columns for name, v in fold.scaled(problem.block, log.exp()).items()}


def build(settings: Settings) -> Ptq161:
    """Return the method for its row of the table."""
    return Ptq161(settings.all_steps, settings.batch, settings.own["parts"])
