"""QEP (Arai and Ichikawa, arXiv 2504.09629): weights that make up for what their inputs have lost, then GPTQ.

In the quantised model a matrix is fed x̂ in place of x: blocks and matrices before it have errors. What W·x was to be,

    W* = W + α·W·E[(x - x̂)·x̂ᵀ]·(E[x̂·x̂ᵀ] + λ)⁻¹

gives from x̂ as well as weights can, at α = 1 on the calibration text. GPTQ then rounds W* by E[x̂·x̂ᵀ]. Matrices follow
each other as the block runs them: each is fed what those before it, rounded, make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tesseraq_gguf.methods.gptq import GPTQ, compensate
from tesseraq_gguf.methods.problem import BlockProblem, Weights
from tesseraq_gguf.methods.start import Start
from tesseraq_gguf.methods.table import BOTH_CHAINS, Settings
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite

_DAMPING = 0.01
"""λ as a share of the mean of E[x̂·x̂ᵀ]'s diagonal, as in GPTQ."""


@dataclass(frozen=True)
class QEP:
    """GPTQ that makes up for what inputs have lost.

    Where it is not known what a matrix is fed in the full-precision model, it is GPTQ alone: in an expert, which other
    tokens come to there.

    Attributes:
        strength: α, 0 to 1. At 1 weights fit the calibration text: docs/notes/starts.md has what is lost elsewhere.
        samples: calibration sequences that moments are measured on, at most.
    """

    strength: float = 0.5
    samples: int = BOTH_CHAINS

    @torch.no_grad()
    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Round the matrices of the block, those first that it runs first, by module name."""
        shared = [] if problem.originals is None else _as_they_run(problem)
        starts: dict[str, Start] = {}
        done: dict[str, Tensor] = {}
        for names, calls in shared:
            problem.report(0, 0, f"rounding {' and '.join(names)}")
            moment, lost = self._moments(problem, names[0], calls, done)
            turn = _solved(moment, lost)
            for name in names:
                weight, grid = problem.matrices()[name], problem.grids[name]
                moved = weight + self.strength * (weight @ turn)
                starts[name] = compensate(moved, moment, grid, _DAMPING, problem.full_name(name))
                done[name] = grid.dequantize(starts[name].tensor)
        rest = {name: grid for name, grid in problem.grids.items() if name not in starts}
        if rest:
            starts |= GPTQ(samples=self.samples).start(replace(problem, grids=rest))
        return {name: starts[name] for name in problem.grids}

    def _moments(self, problem: BlockProblem, name: str, calls: int, done: Weights) -> tuple[Tensor, Tensor]:
        """E[x̂·x̂ᵀ] and E[(x - x̂)·x̂ᵀ] of what a matrix is fed, float32 [in, in].

        Args:
            problem: the block.
            name: of the matrix.
            calls: how often the block runs it.
            done: the matrices that are rounded already, as they are now.
        """
        assert problem.originals is not None
        module = problem.block.matrices()[name]
        width, tokens = module.in_features, 0
        moment, lost = (torch.zeros(width, width, device=problem.device) for _ in range(2))
        here = problem.team.count(min(self.samples, problem.samples or len(problem.inputs)))
        for original, hidden in zip(problem.originals[:here].split(1), problem.inputs[:here].split(1), strict=True):
            with problem.precision():
                full = _fed(module, calls, partial(problem.forward, original.to(problem.device)))
                fed = _fed(module, calls, partial(problem.forward, hidden.to(problem.device), done))
            with torch.autocast(problem.device.type, enabled=False):
                moment.addmm_(fed.T, fed)
                lost.addmm_((full - fed).T, fed)
            tokens += len(fed)
        count = torch.tensor([tokens], dtype=torch.float64)
        problem.team.add_up([moment, lost])
        problem.team.add_up([count])
        moment, lost = moment / float(count), lost / float(count)
        named = {problem.full_name(name): torch.stack([moment.diagonal(), lost.diagonal()])}
        check_finite(named, "the second moments of what it is fed", TAKE_ANOTHER)
        return moment, lost


def _as_they_run(problem: BlockProblem) -> list[tuple[list[str], int]]:
    """Return the matrices in the order in which the block runs them, and how often; those with one input together.

    Experts are left out: which tokens come to them differs between the chains.
    """
    modules = problem.block.matrices()
    seen: list[tuple[Tensor, list[str]]] = []
    calls = Counter[str]()

    def see(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] > 1:
            return
        names = next((names for shared, names in seen if shared is x), None)
        if names is None:
            seen.append((x, [name]))
        else:
            names.append(name)

    handles = [
        modules[name].register_forward_pre_hook(lambda _module, args, name=name: see(name, args[0]))
        for name in problem.grids
        if not stack_of(name)
    ]
    try:
        with problem.precision():
            problem.forward(problem.inputs[:1].to(problem.device))
    finally:
        for handle in handles:
            handle.remove()
    return [(names, calls[names[0]]) for _, names in seen]


class _Enough(Exception):  # noqa: N818  (nothing went wrong)
    """The rest of the block need not run."""


def _fed(module: torch.nn.Module, calls: int, run: Callable[[], Tensor]) -> Tensor:
    """What a module is fed while the block runs, float32 [tokens, in]; the block stops there."""
    found: list[Tensor] = []

    def see(_module: torch.nn.Module, args: Sequence[Tensor]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]).float())
        if len(found) == calls:
            raise _Enough

    handle = module.register_forward_pre_hook(see)
    try:
        run()
    except _Enough:
        pass
    finally:
        handle.remove()
    return torch.cat(found)


def _solved(moment: Tensor, lost: Tensor) -> Tensor:
    """E[(x - x̂)·x̂ᵀ]·(E[x̂·x̂ᵀ] + λ)⁻¹, float32 [in, in]; 0 where nothing was fed."""
    mean = moment.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(moment)
    damped = moment / mean
    damped.diagonal().add_(_DAMPING)
    # the damped moment is symmetric
    return torch.linalg.solve(damped, (lost / mean).T).T


def build(_: Settings) -> QEP:
    """Return the start for its row of the table."""
    return QEP()
