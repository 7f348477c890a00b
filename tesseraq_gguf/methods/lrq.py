"""LRQ (Lee et al., arXiv 2407.11534): FlexRound with a scaling matrix of low rank.

    S = L·U + r + c     L [out, k] zeros, U [k, in] Kaiming-uniform, r [out, 1] and c [1, in] zeros

in the frame of `scaled_rounding`. With k well below the matrix's sides it has a fraction of FlexRound's variables and
less to overfit a small calibration set with. L, U, r and c are thrown away: what leaves is codes and scales.

The released code falls back to a full matrix where a weight is not square; here the rank holds for every shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tesseraq_gguf.methods.scaled_rounding import ScaledRounding
from tesseraq_gguf.methods.start import NEAREST, Initialisation
from tesseraq_gguf.methods.table import Settings

RATES = {2: 6e-4, 3: 3e-4, 4: 3e-4, 8: 2e-5}
"""Learning rates for 5000 steps, by bits. The paper's (appendix, Llama 2 7B: 6e-4 for 3 bits, 9e-4 for 4) were measured
on whole models with few steps, and half of it and a third are better by far (docs/notes/steps-and-rates.md).
"""

GROWTH = 0.85
"""How rates grow with fewer steps, as measured on 200 (docs/notes/steps-and-rates.md): S is a product of which one
factor is 0 at first, and comes from there more slowly than FlexRound's."""

PAPER_SHARE = 4
"""The paper's rank, 1024 for models of 7B, is a quarter of their width."""


class LowRankDivisor:
    """S = L·U + r + c of a matrix [out, in].

    Attributes:
        variables: L [out, k], U [k, in], r [out, 1] and c [1, in].
        rank: k.

    Args:
        weight: the matrix.
        rank: the rank wanted; it is lowered until L and U have fewer variables than the matrix has weights.
        generator: random numbers of the CPU, for U.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        rows, columns = weight.shape
        self.rank = capped(rank, rows, columns)
        bound = (6 / columns) ** 0.5
        right = torch.empty(self.rank, columns).uniform_(-bound, bound, generator=generator).to(weight.device)
        variables = [weight.new_zeros(rows, self.rank), right, weight.new_zeros(rows, 1), weight.new_zeros(1, columns)]
        self.variables = [v.requires_grad_() for v in variables]

    def log(self, dtype: torch.dtype) -> Tensor:
        """S, of `dtype`, [out, in]: for large matrices L·U is as much work as the block itself."""
        left, right, row, column = (v.to(dtype) for v in self.variables)
        return torch.addmm(column, left, right) + row


def capped(rank: int, rows: int, columns: int) -> int:
    """Largest rank up to `rank` at which L and U have fewer variables than the matrix has weights; 1 at least."""
    return max(1, min(rank, (rows * columns - 1) // (rows + columns)))


def lrq(steps: int, batch: int, rank: int, initialisation: Initialisation = NEAREST) -> ScaledRounding:
    """Return the method with so many Adam steps per block, of `batch` samples each."""
    return ScaledRounding(
        lambda weight, generator: LowRankDivisor(weight, rank, generator), RATES, GROWTH, steps, batch, initialisation
    )


def build(settings: Settings, start: Initialisation) -> ScaledRounding:
    """Return the method for its row of the table."""
    rank = settings.own["rank"] or max(1, settings.width // PAPER_SHARE)
    return lrq(settings.all_steps, settings.batch, rank, start)
