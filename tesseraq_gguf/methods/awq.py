"""AWQ (Lin et al., arXiv 2306.00978): channels with large activations are made large in the weights too, so that
rounding harms them less, and clipping ranges are searched on activations.

Scaling (paper §3.2): for what feeds a group of matrices, such as a norm in front of q, k and v,

    s = mean|x|^α / √(max·min)        α = 0, 1/20 … 19/20
    loss(α) = ‖(W - Q(W·diag(s))·diag(s)⁻¹)·X‖²

summed over the matrices. Q rounds to nearest with the parameters that `ClipSearch` would find. The best s is folded
into the block: divided out of the producer, multiplied into the matrices (`models.folding`).

Clipping: `ClipSearch`, an initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.methods.start import Start
from tesseraq_gguf.models.folding import Fold, folds
from tesseraq_gguf.quantized import QuantizedTensor
from tesseraq_gguf.reconstruction import BlockProblem, Method

_SMALLEST = 1e-4
"""Least mean|x|^α: channels that never speak must not decide how the others are scaled."""


@dataclass(frozen=True)
class AWQ:
    """Scale channels, then learn by another method.

    Attributes:
        then: learns the scaled block.
        points: size of the grid of α.
        samples: calibration sequences that activations are measured on, at most.
        rows: rows of each matrix that a loss(α) is measured on, at most.
    """

    then: Method
    points: int = 20
    samples: int = 32
    rows: int = 512

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Fold the best scales into the block, one fold after the other, then learn it."""
        self.scale(problem)
        return self.then.learn(problem)

    @torch.no_grad()
    def scale(self, problem: BlockProblem) -> dict[str, float]:
        """Fold the best scales into the block.

        Returns:
            α by the producer's name.
        """
        sample = problem.inputs[:1].to(problem.device)
        found = folds(problem.block, problem.arguments, sample, problem.grids.keys())
        # no fold changes what a later fold's matrices read, so all can be measured at once
        moments = problem.second_moments(self.samples)
        means = _mean_magnitudes(problem, self.samples)
        chosen = {}
        for fold in found:
            losses = []
            for alpha in self._alphas():
                s = scales(fold, means, alpha)
                losses.append(
                    sum(self._loss(problem, name, fold.columns(name, s), moments[name]) for name in fold.consumers)
                )
            chosen[fold.producer] = alpha = self._alphas()[min(range(self.points), key=losses.__getitem__)]
            if alpha:
                fold.apply(problem.block, scales(fold, means, alpha))
        return chosen

    def _alphas(self) -> list[float]:
        return [i / self.points for i in range(self.points)]

    def _loss(self, problem: BlockProblem, name: str, s: Tensor, moment: Tensor) -> float:
        """Squared error of what a matrix computes, per row, when its columns are scaled by s [in] while rounded."""
        weight = problem.block.matrices()[name].weight.detach()
        weight = weight[:: -(-len(weight) // self.rows)]
        grid = problem.grids[name]
        rounded = grid.quantize(weight * s, moment.diagonal() / s.square())
        off = grid.dequantize(rounded) / s - weight
        return float(((off @ moment) * off).sum())


def scales(fold: Fold, means: dict[str, Tensor], alpha: float) -> Tensor:
    """Return mean|x|^α of a fold's channels, float32 [channels], centred on 1.

    Args:
        fold: whose channels.
        means: mean|x| of each input of each matrix, float32 [in] by module name.
        alpha: the exponent; 0 gives all ones.
    """
    inputs = fold.inputs(fold.consumers[0], means[fold.consumers[0]])
    # query heads that share a channel each see it differently
    channels = torch.zeros(fold.channels, device=inputs.device).index_add_(0, fold.spread, inputs)
    channels /= len(fold.spread) / fold.channels
    s = channels.pow(alpha).clamp_min(_SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def _mean_magnitudes(problem: BlockProblem, samples: int) -> dict[str, Tensor]:
    """Return mean|x| of the inputs of each matrix on the quantised chain, float32 [in] by module name."""
    modules = problem.block.matrices()
    sums = {name: torch.zeros(modules[name].in_features, device=problem.device) for name in problem.grids}

    def add(name: str, x: Tensor) -> None:
        sums[name] += x.flatten(0, -2).float().abs().sum(0)

    problem.observe(samples, add)
    problem.team.add_up(sums.values())
    tokens = problem.tokens_of(samples)
    return {name: total / tokens for name, total in sums.items()}


@dataclass(frozen=True)
class ClipSearch:
    """AWQ's search of clipping ranges as a start: round to nearest within ranges that suit the activations.

    The paper shrinks each group's range until what the group computes on sampled activations errs least. Here every
    group's range, and the parameters within it, are searched for the least squared error of the weights, weighted by
    E[x²] of their columns: the same error for inputs that do not correlate. Queries and keys, which the paper leaves
    out because bare minimum and maximum serve them better, are searched as well.

    Attributes:
        samples: calibration sequences that activations are measured on, at most.
    """

    samples: int = 128

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Return a start for every matrix of the problem, by module name."""
        moments = problem.second_moments(self.samples)
        return {
            name: Start(problem.grids[name].quantize(w, moments[name].diagonal()), w)
            for name, w in problem.matrices().items()
        }
