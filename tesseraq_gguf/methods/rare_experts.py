"""Experts that calibration hardly visits: too few tokens to learn from, so their matrices are rounded with care.

What such a matrix is fed is taken to be like what the same matrices of the block's other experts are fed: E[x²] of all
of them weights the squared error of its columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.types.quantized import QuantizedTensor

if TYPE_CHECKING:
    from tesseraq_gguf.methods.problem import BlockProblem

Visits = Counter[str]
"""How many tokens expert matrices were fed, by module name."""

RARE = 32
"""Calibration tokens below which an expert is not learned, and on which the second moments of its inputs are measured
at least."""

_SAMPLES = 32
"""Samples that E[x²] is measured on, at most."""


@contextmanager
def counted(problem: BlockProblem) -> Iterator[Visits]:
    """Count the tokens that each expert matrix is fed, by module name, whatever runs the block meanwhile.

    Other matrices are among them, with none, where they are not run: a model may use their weights in its own way.
    """
    visits = Visits(dict.fromkeys(problem.grids, 0))
    modules = problem.block.matrices()

    def count(name: str, x: Tensor) -> None:
        visits[name] += x.shape[:-1].numel()

    handles = [
        modules[name].register_forward_pre_hook(lambda _module, args, name=name: count(name, args[0]))
        for name in visits
    ]
    try:
        yield visits
    finally:
        for handle in handles:
            handle.remove()
        for name in [name for name, count in visits.items() if count and not stack_of(name)]:
            del visits[name]


def in_all(visits: Visits, team: Team) -> Visits:
    """Return visits in all processes together."""
    counts = torch.tensor(list(visits.values()), dtype=torch.int64)
    if visits:
        team.add_up([counts])
    return Visits(dict(zip(visits, counts.tolist(), strict=True)))


def on_both_chains(problem: BlockProblem, full: Visits) -> Visits:
    """Count visits on the quantised chain too, whose choice of experts may be another; the smaller count of each.

    What only one chain feeds cannot be learned: there is no input, or a target that knows nothing of it.

    Args:
        problem: the block.
        full: visits on the full-precision chain.
    """
    if not full:
        return full
    with counted(problem) as quantised:
        problem.observe(problem.samples or len(problem.inputs), lambda *_: None)
    quantised = in_all(quantised, problem.team)
    return Visits({name: min(count, quantised[name]) for name, count in full.items()})


def rarely(visits: Visits) -> list[str]:
    """Return the matrices of which too little is known to learn them."""
    return [name for name, count in visits.items() if count < RARE]


@torch.no_grad()
def round_rare(problem: BlockProblem, visits: Visits) -> dict[str, QuantizedTensor]:
    """Round the matrices of rare experts, give the block what they became, and leave the others to the method.

    Returns:
        The rounded matrices by module name; `problem.grids` lacks them afterwards.
    """
    rare = rarely(visits)
    if not rare:
        return {}
    importance = _importance(problem)
    rounded = {}
    for name in rare:
        grid, weight = problem.grids.pop(name), problem.block.matrices()[name].weight.detach()
        rounded[name] = grid.quantize(weight, problem.importance.get(name, importance.get(stack_of(name))))
        problem.block.replace(f"{name}.weight", grid.dequantize(rounded[name]).to(problem.device))
    return rounded


def _importance(problem: BlockProblem) -> dict[str | None, Tensor]:
    """E[x²] of what the matrices of a stack are fed, float32 [in], by its name; none where no expert was visited."""
    sums: dict[str | None, Tensor] = {}
    tokens: Counter[str | None] = Counter()

    def see(name: str, x: Tensor) -> None:
        stack = stack_of(name)
        if stack and x.numel():
            rows = x.reshape(-1, x.shape[-1]).float()
            sums[stack] = sums.get(stack, torch.zeros((), device=rows.device)) + rows.square().sum(0)
            tokens[stack] += len(rows)

    problem.observe(_SAMPLES, see)
    together: dict[str | None, Tensor] = {}
    fed: Counter[str | None] = Counter()
    for theirs, counts in problem.team.all(lambda: ({n: s.cpu() for n, s in sums.items()}, dict(tokens))):
        for stack, total in theirs.items():
            together[stack] = together[stack] + total if stack in together else total
        fed.update(counts)
    return {stack: (total / fed[stack]).to(problem.device) for stack, total in together.items()}
