"""Powers of two that bring matrices to where the scales of their type are finest.

Scales of NVFP4 are floats of 8 bits, with even steps below 2^-7 that are too coarse for the weights of most models.
The type's own remedy is a factor for a whole matrix, but many graphs of llama.cpp leave it out. Matrices that have
none get it here, where it costs nothing: in the norm, or the rows of the linear, that makes what a matrix reads, as
AWQ's scales do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.models.folding import Fold

_ABOVE = 3
"""Powers of two that the largest weight of a matrix should be above the least that suits a group: no more lie between
the largest weights of most groups."""

_BELOW = 3
"""Powers of two that it should stay below the largest that suits a group: AWQ and learning move scales."""


@torch.no_grad()
def enlarge(problem: BlockProblem, found: Sequence[Fold]) -> None:
    """Fold powers of two into the block where a type wants larger weights.

    Args:
        problem: the block, which still computes what it did.
        found: its foldings, in the order in which their consumers run. The last come first, for what one takes from
            the rows of a linear, the one before gives them.
    """
    for fold in reversed(found):
        rooms = [_room(problem, name) for name in fold.consumers]
        power = min(max(lacking for lacking, _ in rooms), *(room for _, room in rooms))
        if power > 0:
            fold.apply(problem.block, torch.full((fold.channels,), 2.0**power, device=problem.device))


def _room(problem: BlockProblem, name: str) -> tuple[float, float]:
    """Powers of two that a matrix lacks, and those that it could be larger by; none, and as many as one likes."""
    wanted = problem.grids[name].wanted
    largest = float(problem.block.matrices()[name].weight.abs().max())
    if wanted is None or largest == 0:
        return 0, math.inf
    least, most = (math.log2(end / largest) for end in wanted)
    return math.ceil(least) + _ABOVE, math.floor(most) - _BELOW
