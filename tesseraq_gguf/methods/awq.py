"""AWQ (Lin et al., arXiv 2306.00978): channels with large activations are made large in the weights too, so that
rounding harms them less, and clipping ranges are searched on activations.

Scaling (paper §3.2): for what feeds a group of matrices, such as a norm in front of q, k and v,

    s = mean|x|^α / √(max·min)        α = 0, 1/20 … 19/20
    loss(α) = ‖(W - Q(W·diag(s))·diag(s)⁻¹)·X‖²

summed over the matrices. Q rounds to nearest with the parameters that `ClipSearch` would find. The best s is folded
into the block: divided out of the producer, multiplied into the matrices (`models.folding`).

Where activations are rounded as well, by A, their error decides with that of the weights, and shifts from one to the
other as it does in SmoothQuant (arXiv 2211.10438):

    loss(α) = ‖W·X - Q(W·diag(s))·A(diag(s)⁻¹·X)‖²

Before, matrices are made large where their type wants it (`enlarging.py`).

Clipping: `ClipSearch`, an initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.methods.enlarging import enlarge
from tesseraq_gguf.methods.problem import BlockProblem, Method
from tesseraq_gguf.methods.rare_experts import RARE
from tesseraq_gguf.methods.start import Start
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite
from tesseraq_gguf.models.folding import Fold
from tesseraq_gguf.types.quantized import QuantizedTensor

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
        tokens: that it is measured on where activations are rounded, at most.
    """

    then: Method
    points: int = 20
    samples: int = 32
    rows: int = 512
    tokens: int = 2048

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Fold the best scales into the block, one fold after the other, then learn it."""
        self.scale(problem)
        return self.then.learn(problem)

    @torch.no_grad()
    def scale(self, problem: BlockProblem) -> dict[str, float]:
        """Fold the best scales into the block.

        Returns:
            α by the producer's name.

        Raises:
            NotFiniteError: errors overflow, so none could be told from another.
        """
        problem.report(0, 0, "looking for scales of channels")
        found = problem.folds()
        enlarge(problem, found)
        # no fold changes what a later fold's matrices read, so all can be measured at once
        moments = problem.second_moments(self.samples)
        means = _mean_magnitudes(problem, self.samples)
        fed = self._fed(problem) if _rounds_tokens(problem) else None
        chosen = {}
        for fold in found:
            losses = torch.zeros(self.points, dtype=torch.float64)
            for point, alpha in enumerate(self._alphas()):
                s = scales(fold, means, alpha)
                for name in fold.consumers:
                    columns = fold.columns(name, s)
                    if fed is None:
                        losses[point] += self._loss(problem, name, columns, moments[name])
                    else:
                        losses[point] += self._rounded_loss(problem, name, columns, moments[name], fed[name])
            if fed is not None:  # every process has tokens of its own, and all must choose the same
                problem.team.add_up([losses])
            check_finite({problem.full_name(fold.consumers[0]): losses}, "the errors of scaling it", TAKE_ANOTHER)
            chosen[fold.producer] = alpha = self._alphas()[int(losses.argmin())]
            if alpha:
                fold.apply(problem.block, scales(fold, means, alpha))
        return chosen

    def _alphas(self) -> list[float]:
        return [i / self.points for i in range(self.points)]

    def _loss(self, problem: BlockProblem, name: str, s: Tensor, moment: Tensor) -> float:
        """Squared error of what a matrix computes, per row, when its columns are scaled by s [in] while rounded."""
        weight, rounded = self._rounded(problem, name, s, moment)
        off = rounded / s - weight
        return float(((off @ moment) * off).sum())

    def _rounded_loss(self, problem: BlockProblem, name: str, s: Tensor, moment: Tensor, fed: Tensor) -> float:
        """The same where what it is fed, float32 [tokens, in], is divided by s and rounded."""
        assert problem.rounding
        weight, rounded = self._rounded(problem, name, s, moment)
        off = problem.rounding.feed(name, fed / s) @ rounded.T - fed @ weight.T
        return float(off.square().sum())

    def _rounded(self, problem: BlockProblem, name: str, s: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of a matrix, and the same with columns scaled by s [in], rounded."""
        weight = problem.block.matrices()[name].weight.detach()
        weight = weight[:: -(-len(weight) // self.rows)]
        grid = problem.grids[name]
        return weight, grid.dequantize(grid.quantize(weight * s, moment.diagonal() / s.square()))

    def _fed(self, problem: BlockProblem) -> dict[str, Tensor]:
        """What matrices are fed before anything is rounded, float32 [tokens, in] by module name."""
        samples = max(1, min(self.samples, self.tokens // problem.inputs.shape[1]))
        widths = {name: problem.block.matrices()[name].in_features for name in problem.grids}
        seen = {name: [torch.empty(0, width, device=problem.device)] for name, width in widths.items()}
        problem.observe(samples, lambda name, x: seen[name].append(x.flatten(0, -2).float()), RARE)
        return {name: torch.cat(parts) for name, parts in seen.items()}


def _rounds_tokens(problem: BlockProblem) -> bool:
    """Whether what matrices are fed is rounded in ranges of its own, which follow when it is scaled."""
    return (
        problem.rounding is not None and problem.rounding.scheme.bits is not None and not problem.rounding.scheme.static
    )


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

    tokens = problem.observe(samples, add, RARE)
    problem.team.add_up(sums.values())
    return {name: total / tokens[name] for name, total in sums.items()}


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


def build(_: Settings) -> ClipSearch:
    """Return the start for its row of the table: the scales are folded in around whatever begins there."""
    return ClipSearch()
